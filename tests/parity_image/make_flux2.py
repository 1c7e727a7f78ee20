"""Make the tiny FLUX.2 klein pipeline of the parity tests, and what diffusers says of it.

Needs torch (CPU), diffusers and transformers; the tests need none of them. Everything is seeded by name, so a second
run on the same machine and versions gives the same bytes.

    python tests/parity_image/make_flux2.py
"""

import json
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "flux2_klein"
sys.path.append(str(HERE.parent / "parity"))

import tiny_tokenizer  # noqa: E402 - it lies in the other folder of fixtures

Arrays = dict[str, np.ndarray]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
PROMPT, NEGATIVE = "the quick brown fox jumps over the sea", "no lazy dog, no shells"
# The embeddings are 512 rows: all that the prompt fills, then samples of the padding.
ROWS = [*range(48), *range(48, 512, 16), 511]
CHANNELS = 32
# Width and height in pixels, and the indices of the reference pictures.
RUNS = {
    "square": (64, 64, ()),
    "wide": (96, 32, ()),
    "tall": (48, 80, ()),
    "one_reference": (64, 48, (0,)),
    "two_references": (48, 64, (0, 1)),
    "guided": (64, 64, ()),
}
GUIDANCE = 3.0


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng([23, zlib.crc32(name.encode())])


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """No value is a default, and no layer so weak that a mistake in it would not show."""
    random = rng(name)
    if name.endswith("running_var"):
        return random.uniform(0.3, 2.5, shape).astype(np.float32)
    if name.endswith("running_mean"):
        return random.normal(0.0, 0.5, shape).astype(np.float32)
    if any(part in name for part in ("norm_q", "norm_k", "norm_added_")):
        # Wide scores, so that attention chooses and does not average: else what few tokens say would not show.
        return random.uniform(1.2, 3.0, shape).astype(np.float32)
    if "norm" in name and len(shape) == 1 and name.endswith("weight"):
        return random.uniform(0.5, 1.6, shape).astype(np.float32)
    if len(shape) == 1:
        return random.normal(0.0, 0.3, shape).astype(np.float32)
    # The picture is to be neither black nor white anywhere: clipping hides what is wrong.
    gain = 0.35 if name.endswith("decoder.conv_out.weight") else 1.4
    return random.normal(0.0, gain / np.prod(shape[1:]) ** 0.5, shape).astype(np.float32)


def randomise(model: torch.nn.Module, prefix: str) -> torch.nn.Module:
    """Random weights that bfloat16 holds exactly: so the files are small and float32 sees the same numbers."""
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            value = torch.from_numpy(random_tensor(f"{prefix}.{name}", tuple(tensor.shape)))
            state[name] = value.to(torch.bfloat16).float()
    model.load_state_dict(state)
    return model.eval()


def transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=64,
        mlp_ratio=3.0,
        axes_dims_rope=(4, 4, 4, 4),
        rope_theta=2000,
        guidance_embeds=False,
    )


def text_encoder() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=tiny_tokenizer.VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return Qwen3ForCausalLM(config)


def autoencoder() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=CHANNELS // 4,
        norm_num_groups=4,
        sample_size=64,
        batch_norm_eps=3e-3,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
    )


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    tiny_tokenizer.write(tiny_tokenizer.build(), folder)
    (folder / "generation_config.json").unlink()
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["chat_template"]
    settings["pad_token"] = tiny_tokenizer.SPECIAL[0]
    file.write_text(json.dumps(settings, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_checkpoint() -> None:
    """The folder as diffusers keeps one, weights in bfloat16."""
    parts = {"transformer": transformer(), "vae": autoencoder(), "text_encoder": text_encoder()}
    for name, model in parts.items():
        randomise(model, name).to(torch.bfloat16).save_pretrained(FOLDER / name)
    (FOLDER / "text_encoder" / "generation_config.json").unlink(missing_ok=True)
    scheduler().save_pretrained(FOLDER / "scheduler")
    write_tokenizer(FOLDER / "tokenizer")
    index = {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": "0.42.1",
        "is_distilled": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2))


def load_pipeline() -> Flux2KleinPipeline:
    """As a user would, in float32."""
    text = Qwen3ForCausalLM.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32, attn_implementation="eager")
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler"),
        vae=AutoencoderKLFlux2.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32),
        text_encoder=text,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(FOLDER / "tokenizer", padding_side="right"),
        transformer=Flux2Transformer2DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32),
        is_distilled=True,
    )


def picture(index: int) -> np.ndarray:
    """A picture that packs well and is the same under no flip or turn. Shape: uint8 (H, W, 3)."""
    width, height = ((90, 71), (68, 100))[index]
    y, x = np.mgrid[:height, :width]
    red = 255 * x // width
    green = np.where((x // 11 + y // 7) % 2 == index, 220, 30)
    blue = 255 * y // height
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def text_goldens(pipe: Flux2KleinPipeline) -> Arrays:
    embeds, _ = pipe.encode_prompt(PROMPT)
    blank, _ = pipe.encode_prompt("")
    long, _ = pipe.encode_prompt("the fox " * 700)
    return {
        "text.rows": np.array(ROWS, np.int32),
        "text.prompt": embeds[0, ROWS].numpy(),
        "text.blank": blank[0, ROWS].numpy(),
        "text.truncated": long[0, ROWS].numpy(),
    }


def sigma_goldens(pipe: Flux2KleinPipeline) -> Arrays:
    """The schedules of several sizes and step counts, on both sides of the formula's bend at 4300 tokens."""
    arrays: Arrays = {}
    for tokens, steps in ((16, 2), (256, 4), (4096, 4), (4096, 50), (4300, 10), (4301, 10), (16384, 28)):
        mu = compute_empirical_mu(tokens, steps)
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        arrays[f"sigmas.{tokens}.{steps}"] = pipe.scheduler.sigmas.numpy().copy()
    return arrays


def transformer_goldens(pipe: Flux2KleinPipeline) -> Arrays:
    arrays: Arrays = {}
    text = rng("forward.text").normal(0.0, 1.0, (20, 48)).astype(np.float32)
    arrays["forward.text"] = text
    shapes: dict[str, tuple[tuple[int, int], ...]] = {
        "square": ((4, 4),),
        "wide": ((2, 6),),
        "tall": ((7, 3),),
        "references": ((3, 4), (2, 3), (4, 2)),
    }
    for name, grids in shapes.items():
        latents = [rng(f"forward.{name}.{n}").normal(0.0, 1.0, (1, CHANNELS, *g)) for n, g in enumerate(grids)]
        tensors = [torch.from_numpy(each.astype(np.float32)) for each in latents]
        ids = pipe._prepare_latent_ids(tensors[0])
        if tensors[1:]:
            ids = torch.cat([ids, pipe._prepare_image_ids(tensors[1:])], dim=1)
        packed = torch.cat([pipe._pack_latents(each) for each in tensors], dim=1)
        embedded = torch.from_numpy(text)[None]
        output = pipe.transformer(
            hidden_states=packed,
            encoder_hidden_states=embedded,
            timestep=torch.tensor([0.6]),
            img_ids=ids,
            txt_ids=pipe._prepare_text_ids(embedded),
            return_dict=False,
        )[0]
        arrays[f"forward.{name}.grids"] = np.array(grids, np.int32)
        arrays[f"forward.{name}.tokens"] = packed[0].numpy()
        arrays[f"forward.{name}.output"] = output[0, : grids[0][0] * grids[0][1]].numpy()
    return arrays


def autoencoder_goldens(pipe: Flux2KleinPipeline) -> Arrays:
    """A picture to packed, normalised latents, and back from others. Layouts: NCHW latents, HWC pixels in [-1, 1]."""
    pixels = picture(0)[:64, :80].astype(np.float32) / 127.5 - 1.0
    encoded = pipe._encode_vae_image(torch.from_numpy(pixels).permute(2, 0, 1)[None], None)
    latents = torch.from_numpy(rng("decode").normal(0.0, 1.0, (1, CHANNELS, 3, 5)).astype(np.float32))
    std = torch.sqrt(pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).view(1, -1, 1, 1)
    unpacked = pipe._unpatchify_latents(latents * std + pipe.vae.bn.running_mean.view(1, -1, 1, 1))
    decoded = pipe.vae.decode(unpacked, return_dict=False)[0]
    return {
        "vae.pixels": pixels,
        "vae.encoded": encoded.numpy(),
        "vae.latents": latents.numpy(),
        "vae.decoded": decoded[0].permute(1, 2, 0).contiguous().numpy(),
    }


def reference_goldens(pipe: Flux2KleinPipeline) -> Arrays:
    """Pictures as diffusers prepares them: cropped, and shrunk first where they are large."""
    arrays: Arrays = {"picture.0": picture(0), "picture.1": picture(1)}
    for name, repeats in (("small", (1, 1, 1)), ("large", (11, 17, 1)), ("long", (4, 24, 1))):
        image = PIL.Image.fromarray(np.tile(picture(0), repeats))
        pipe.image_processor.check_image_input(image)
        if image.width * image.height > 1024 * 1024:
            image = pipe.image_processor._resize_to_target_area(image, 1024 * 1024)
        width, height = image.width // 16 * 16, image.height // 16 * 16
        prepared = pipe.image_processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]
        means = prepared.reshape(3, height // 16, 16, width // 16, 16).mean(dim=(2, 4))
        arrays[f"reference.{name}.repeats"] = np.array(repeats, np.int32)
        arrays[f"reference.{name}.size"] = np.array([width, height], np.int32)
        arrays[f"reference.{name}.means"] = means.permute(1, 2, 0).contiguous().numpy()
    return arrays


def run_goldens(pipe: Flux2KleinPipeline) -> Arrays:
    """Whole runs of two steps: the first noise, the latents after each step, the picture."""
    arrays: Arrays = {}
    negative, _ = pipe.encode_prompt(NEGATIVE)
    for name, (width, height, references) in RUNS.items():
        noise = rng(f"run.{name}").normal(0.0, 1.0, (1, CHANNELS, height // 16, width // 16)).astype(np.float32)
        after: list[np.ndarray] = []
        pipe.register_to_config(is_distilled=name != "guided")
        result = pipe(
            image=[PIL.Image.fromarray(picture(index)) for index in references] or None,
            prompt=PROMPT,
            width=width,
            height=height,
            num_inference_steps=2,
            guidance_scale=GUIDANCE,
            negative_prompt_embeds=negative,
            latents=torch.from_numpy(noise),
            output_type="np",
            callback_on_step_end=recorder(after),
        )
        arrays[f"run.{name}.size"] = np.array([width, height], np.int32)
        arrays[f"run.{name}.references"] = np.array(references, np.int32)
        arrays[f"run.{name}.noise"] = noise
        arrays[f"run.{name}.latents"] = after[-1]
        arrays[f"run.{name}.pixels"] = (result.images[0] * 255).round().astype(np.uint8)
        print(name, "pixels", result.images[0].mean(), result.images[0].std(), "latents", after[-1].std())
    return arrays


def recorder(after: list[np.ndarray]) -> Callable[..., dict[str, torch.Tensor]]:
    def record(pipe: object, step: int, timestep: object, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        after.append(values["latents"][0].numpy().copy())
        return {}

    return record


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write_checkpoint()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    makers = (text_goldens, sigma_goldens, transformer_goldens, autoencoder_goldens, reference_goldens, run_goldens)
    arrays: Arrays = {}
    for make in makers:
        arrays |= make(pipe)
    np.savez_compressed(FOLDER / "goldens.npz", **arrays)


if __name__ == "__main__":
    main()
