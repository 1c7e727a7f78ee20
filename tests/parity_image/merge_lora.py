"""Make tiny LoRA files under every naming that is read, and the weights that diffusers and PEFT merge them into.

Needs torch (CPU), diffusers, transformers and peft; the tests need none of them. Reads the pipelines that
make_z_image.py and make_flux2.py made; everything is seeded by name, so a second run gives the same bytes.

    python tests/parity_image/merge_lora.py
"""

import json
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).parent
FOLDER = HERE / "lora"
RANK = 4
PIPELINES = {"z_image": ZImagePipeline, "flux2_klein": Flux2KleinPipeline}

# The layers of a file by their names in it, with (out, in) and alpha (None: none is written).
Layers = dict[str, tuple[int, int, float | None]]
FILES: dict[str, tuple[str, tuple[str, str], float, Layers]] = {
    "diffusers": (
        "z_image",
        ("lora_A", "lora_B"),
        0.7,
        {
            "transformer.layers.0.attention.to_q": (32, 32, None),
            "transformer.layers.1.feed_forward.w1": (85, 32, None),
            "transformer.context_refiner.0.attention.to_out.0": (32, 32, None),
        },
    ),
    "comfyui": (
        "z_image",
        ("lora_down", "lora_up"),
        1.0,
        {
            "diffusion_model.layers.1.attention.to_k": (32, 32, 2.0),
            "diffusion_model.layers.0.attention.out": (32, 32, 8.0),
        },
    ),
    "kohya": (
        "z_image",
        ("lora_down", "lora_up"),
        -0.5,
        {
            "lora_unet_layers_0_attention_qkv": (96, 32, 2.0),
            "lora_unet_noise_refiner_1_feed_forward_w2": (32, 85, 4.0),
        },
    ),
    "klein": (
        "flux2_klein",
        ("lora_A", "lora_B"),
        1.5,
        {
            "diffusion_model.double_blocks.0.img_attn.qkv": (96, 32, None),
            "diffusion_model.double_blocks.1.txt_attn.proj": (32, 32, None),
            "diffusion_model.double_blocks.0.img_mlp.2": (32, 96, None),
            "diffusion_model.single_blocks.1.linear2": (32, 128, None),
            "diffusion_model.time_in.in_layer": (32, 64, None),
            "diffusion_model.double_stream_modulation_img.lin": (192, 32, None),
        },
    ),
    "klein_kohya": (
        "flux2_klein",
        ("lora_down", "lora_up"),
        1.0,
        {
            "lora_unet_double_blocks_1_txt_attn_qkv": (96, 32, 1.0),
            "lora_unet_single_blocks_0_linear1": (288, 32, 8.0),
        },
    ),
}


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    random = np.random.default_rng([31, zlib.crc32(name.encode())])
    return torch.from_numpy(random.normal(0.0, shape[-1] ** -0.5, shape).astype(np.float32))


def write(name: str, halves: tuple[str, str], layers: Layers) -> Path:
    tensors = {}
    for layer, (rows, columns, alpha) in layers.items():
        tensors[f"{layer}.{halves[0]}.weight"] = random_tensor(f"{name}.{layer}.down", (RANK, columns))
        tensors[f"{layer}.{halves[1]}.weight"] = random_tensor(f"{name}.{layer}.up", (rows, RANK))
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    path = FOLDER / f"{name}.safetensors"
    save_file(tensors, path)
    return path


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in module.state_dict().items()
        if "lora_" not in name
    }


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
    assert before.keys() == after.keys()
    return ((name, after[name].contiguous()) for name in before if not torch.equal(before[name], after[name]))


def merged_by_diffusers(path: Path, pipeline: str, scale: float) -> dict[str, torch.Tensor]:
    pipe = PIPELINES[pipeline].from_pretrained(HERE / pipeline, torch_dtype=torch.float32)
    before = weights(pipe.transformer)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(components=["transformer"], lora_scale=scale)
    return dict(changed(before, weights(pipe.transformer)))


def merged_by_peft() -> dict[str, torch.Tensor]:
    """An adapter with alphas that only its configuration knows, saved by PEFT and, with metadata, by diffusers."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=6,
        use_rslora=True,
        alpha_pattern={"layers.0.attention.to_v": 10},
        target_modules=["layers.0.attention.to_v", "layers.1.attention.to_v"],
    )
    transformer = ZImagePipeline.from_pretrained(HERE / "z_image", torch_dtype=torch.float32).transformer
    before = weights(transformer)
    model = get_peft_model(transformer, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(random_tensor(f"peft.{name}", tuple(value.shape)))
    model.save_pretrained(FOLDER / "peft")
    (FOLDER / "peft" / "README.md").unlink()
    file = FOLDER / "peft" / "adapter_config.json"
    written = json.loads(file.read_text())
    # PEFT writes a set in any order.
    file.write_text(json.dumps(written | {"target_modules": sorted(written["target_modules"])}, indent=2) + "\n")
    layers = {
        name.removeprefix("base_model.model.").replace(".default", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    plain = {key: value for key, value in config.to_dict().items() if key in LoraConfig.__dataclass_fields__}
    ZImagePipeline.save_lora_weights(
        FOLDER,
        transformer_lora_layers=layers,
        weight_name="metadata.safetensors",
        transformer_lora_adapter_metadata={
            key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()
        },
    )
    return dict(changed(before, weights(model.merge_and_unload())))


def main() -> None:
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    goldens: dict[str, torch.Tensor] = {}
    for name, (pipeline, halves, scale, layers) in FILES.items():
        path = write(name, halves, layers)
        found = merged_by_diffusers(path, pipeline, scale)
        print(name, sorted(found))
        goldens |= {f"{name}/{key}": value for key, value in found.items()}
    goldens |= {f"peft/{key}": value for key, value in merged_by_peft().items()}
    save_file(goldens, FOLDER / "goldens.safetensors")


if __name__ == "__main__":
    main()
