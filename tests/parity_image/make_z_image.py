"""Make the tiny Z-Image pipeline of the parity tests, and what diffusers says of it.

Needs torch (CPU), diffusers and transformers; the tests need none of them. Everything is seeded by name, so a second
run on the same machine and versions gives the same bytes.

    python tests/parity_image/make_z_image.py
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
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.z_image import pipeline_z_image_img2img
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

HERE = Path(__file__).parent
FOLDER = HERE / "z_image"
sys.path.append(str(HERE.parent / "parity"))

import tiny_tokenizer  # noqa: E402 - it lies in the other folder of fixtures

Arrays = dict[str, np.ndarray]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
PROMPT, NEGATIVE = "the quick brown fox jumps over the sea", "no lazy dog"
CHANNELS, CAPTION_DIM = 8, 32
# Height and width of the latents, tokens of the caption: with filling of the image, the caption, both or neither.
FORWARDS = {"square": (8, 8, 20), "wide": (4, 18, 32), "tall": (16, 8, 40), "exact": (16, 8, 64)}
# Width and height in pixels, steps, guidance, strength (0: from noise alone).
RUNS = {
    "square": (64, 64, 2, 0.0, 0.0),
    "wide": (112, 32, 2, 0.0, 0.0),
    "tall": (48, 96, 3, 0.0, 0.0),
    "guided": (64, 48, 2, 3.0, 0.0),
    "from_picture": (64, 48, 4, 0.0, 0.6),
    "from_picture_guided": (48, 64, 3, 2.5, 0.9),
}


def rng(name: str) -> np.random.Generator:
    return np.random.default_rng([29, zlib.crc32(name.encode())])


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """No value is a default, and no layer so weak that a mistake in it would not show."""
    random = rng(name)
    if "norm_q" in name or "norm_k" in name:
        # Wide scores, so that attention chooses and does not average: else what few tokens say would not show.
        return random.uniform(1.0, 2.5, shape).astype(np.float32)
    if "norm" in name and len(shape) == 1 and name.endswith("weight"):
        return random.uniform(0.5, 1.6, shape).astype(np.float32)
    if name.endswith("pad_token"):
        return random.normal(0.0, 1.0, shape).astype(np.float32)
    if len(shape) == 1:
        return random.normal(0.0, 0.3, shape).astype(np.float32)
    # The picture is to be neither black nor white anywhere: clipping hides what is wrong.
    gain = 0.35 if name.endswith("decoder.conv_out.weight") else 1.3
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


def transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=CAPTION_DIM,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )


def text_encoder() -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=tiny_tokenizer.VOCAB_SIZE,
            hidden_size=CAPTION_DIM,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
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
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False).save_pretrained(FOLDER / "scheduler")
    write_tokenizer(FOLDER / "tokenizer")
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2))


def load_parts() -> dict[str, object]:
    """As a user would, in float32."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler"),
        "vae": AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32),
        "text_encoder": Qwen3Model.from_pretrained(
            FOLDER / "text_encoder", dtype=torch.float32, attn_implementation="eager"
        ),
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(FOLDER / "tokenizer", padding_side="right"),
        "transformer": ZImageTransformer2DModel.from_pretrained(FOLDER / "transformer", torch_dtype=torch.float32),
    }


def picture() -> np.ndarray:
    """A picture that packs well and is the same under no flip or turn. Shape: uint8 (48, 64, 3)."""
    y, x = np.mgrid[:48, :64]
    checks = np.where((x // 11 + y // 7) % 2 == 0, 220, 30)
    return np.stack([255 * x // 64, checks, 255 * y // 48], axis=-1).astype(np.uint8)


def text_goldens(pipe: ZImagePipeline) -> Arrays:
    long = pipe.encode_prompt("the fox " * 700, do_classifier_free_guidance=False)[0][0]
    return {
        "text.prompt": pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0][0].numpy(),
        "text.blank": pipe.encode_prompt("", do_classifier_free_guidance=False)[0][0].numpy(),
        "text.truncated.shape": np.array(long.shape, np.int32),
        "text.truncated": long[-8:].numpy(),
    }


def sigma_goldens() -> Arrays:
    """Schedules of every kind, several step counts each."""
    kinds: dict[str, tuple[dict[str, object], int]] = {
        "none": ({}, 0),
        "static": ({"shift": 3.0}, 0),
        "exponential": ({"use_dynamic_shifting": True}, 1024),
        "linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 4096),
        "terminal": ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 300),
    }
    arrays: Arrays = {}
    for kind, (settings, tokens) in kinds.items():
        for steps in (2, 9, 50):
            scheduler = FlowMatchEulerDiscreteScheduler(**settings)
            sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
            scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens) if tokens else None)
            arrays[f"sigmas.{kind}.{steps}.{tokens}"] = scheduler.sigmas.numpy().copy()
    return arrays


def transformer_goldens(model: ZImageTransformer2DModel) -> Arrays:
    """One forward pass a size, and what its parts gave on the way."""
    arrays: Arrays = {}
    parts = {
        "time": model.t_embedder,
        "image": model.noise_refiner[-1],
        "caption": model.context_refiner[-1],
        "hidden": model.layers[-1],
    }
    for name, (height, width, tokens) in FORWARDS.items():
        seen: Arrays = {}
        hooks = [part.register_forward_hook(keeper(seen, key)) for key, part in parts.items()]
        latents = rng(f"forward.{name}").normal(0.0, 1.0, (CHANNELS, height, width)).astype(np.float32)
        caption = rng(f"forward.{name}.caption").normal(0.0, 2.0, (tokens, CAPTION_DIM)).astype(np.float32)
        output = model(
            [torch.from_numpy(latents)[:, None]],
            torch.tensor([0.3]),
            [torch.from_numpy(caption)],
            return_dict=False,
        )[0][0]
        for hook in hooks:
            hook.remove()
        arrays |= {f"forward.{name}.{key}": value for key, value in seen.items()}
        arrays[f"forward.{name}.latents"] = latents
        arrays[f"forward.{name}.embeddings"] = caption
        arrays[f"forward.{name}.output"] = output[:, 0].numpy()
    return arrays


def keeper(seen: Arrays, key: str) -> Callable[..., None]:
    def keep(module: object, inputs: object, output: torch.Tensor) -> None:
        seen[key] = output[0].numpy().copy()

    return keep


def run_goldens(parts: dict[str, object]) -> Arrays:
    """Whole runs: the noise, the latents after the last step, the picture."""
    arrays: Arrays = {"picture": picture()}
    # Image-to-image is to start from the mean of what the encoder says, as ours does, and from a given noise.
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mean
    for name, (width, height, steps, guidance, strength) in RUNS.items():
        noise = rng(f"run.{name}").normal(0.0, 1.0, (1, CHANNELS, height // 8, width // 8)).astype(np.float32)
        after: list[np.ndarray] = []
        pipe = (ZImageImg2ImgPipeline if strength else ZImagePipeline)(**parts)
        pipe.set_progress_bar_config(disable=True)
        more: dict[str, object] = {"latents": torch.from_numpy(noise)}
        if strength:
            pipeline_z_image_img2img.randn_tensor = lambda *_, **__: torch.from_numpy(noise)  # noqa: B023
            image = PIL.Image.fromarray(picture()).resize((width, height), PIL.Image.Resampling.LANCZOS)
            more = {"image": image, "strength": strength}
            arrays[f"run.{name}.picture"] = np.asarray(image)
        result = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
            callback_on_step_end=recorder(after),
            **more,
        )
        arrays[f"run.{name}.noise"] = noise
        arrays[f"run.{name}.latents"] = after[-1]
        arrays[f"run.{name}.steps"] = np.array(len(after), np.int32)
        arrays[f"run.{name}.pixels"] = (result.images[0] * 255).round().astype(np.uint8)
        print(name, "pixels", result.images[0].mean(), result.images[0].std(), "latents", after[-1].std())
    return arrays


def recorder(after: list[np.ndarray]) -> Callable[..., dict[str, torch.Tensor]]:
    def record(pipe: object, step: int, timestep: object, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        after.append(values["latents"].numpy().copy())
        return {}

    return record


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write_checkpoint()
    parts = load_parts()
    arrays = text_goldens(ZImagePipeline(**parts)) | sigma_goldens() | transformer_goldens(parts["transformer"])
    arrays |= run_goldens(parts)
    np.savez_compressed(FOLDER / "goldens.npz", **arrays)


if __name__ == "__main__":
    main()
