"""Make the tiny autoencoders of the parity tests and what diffusers makes of pictures and latents with them.

Needs torch (CPU) and diffusers; the tests need neither. Everything is seeded by name.

    python tests/parity_image/make_autoencoder.py
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import save_file

HERE = Path(__file__).parent
SIZES = ((48, 48), (32, 80), (88, 40))
"""Pixels, (height, width): square, wide, tall; not all multiples of a power of two above the scale."""

CASES: dict[str, dict[str, object]] = {
    # As Z-Image's and FLUX.1's: no quant convs, a shift, 8 pixels to a latent.
    "autoencoder": {
        "block_out_channels": (16, 16, 24, 24),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    # As the older ones: quant convs, no shift; two layers, no attention, widths that are no powers of two.
    "autoencoder_quant": {
        "block_out_channels": (8, 16, 12),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.18215,
        "mid_block_add_attention": False,
    },
}


def random_tensor(name: str, shape: Sequence[int]) -> torch.Tensor:
    """No value is a default: norms are off one, biases off zero, attention scores wide enough to choose.

    Rounded to bfloat16, in which they are stored.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if "norm" in name and name.endswith("weight"):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("bias"):
        values = rng.normal(0.0, 0.2, shape)
    else:
        gain = 3.0 if "to_q" in name or "to_k" in name else 0.3 if "decoder.conv_out" in name else 1.2
        values = rng.normal(0.0, gain / np.prod(shape[1:]) ** 0.5, shape)
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float()


def picture(height: int, width: int) -> np.ndarray:
    """Slopes and edges and a little noise, float32 (1, H, W, 3) in -1..1."""
    rng = np.random.default_rng([height, width])
    y, x = np.mgrid[:height, :width] / 16.0
    waves = np.stack([np.sin(x + 2 * y), np.cos(1.5 * x - y), np.sign(np.sin(x) * np.cos(y))], axis=-1)
    return np.clip(0.8 * waves + rng.normal(0, 0.1, waves.shape), -1, 1)[None].astype(np.float32)


@torch.inference_mode()
def reference(vae: AutoencoderKL) -> dict[str, np.ndarray]:
    """Pictures, latents (unlike the encoder's), and what becomes of them; all NHWC, latents as a pipeline has them."""
    arrays: dict[str, np.ndarray] = {}
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    downscale = 2 ** (len(vae.config.block_out_channels) - 1)
    for n, (height, width) in enumerate(SIZES):
        pixels = picture(height, width)
        mean = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.mode()
        rng = np.random.default_rng([n, 7])
        shape = (1, height // downscale, width // downscale, vae.config.latent_channels)
        latents = rng.normal(0, 1, shape).astype(np.float32)
        decoded = vae.decode(torch.from_numpy(latents).permute(0, 3, 1, 2) / scale + shift).sample
        arrays |= {f"picture.{n}": pixels, f"latents.{n}": latents}
        arrays[f"encoded.{n}"] = ((mean - shift) * scale).permute(0, 2, 3, 1).numpy()
        arrays[f"decoded.{n}"] = decoded.permute(0, 2, 3, 1).numpy()
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def main() -> None:
    """Write one folder a case: a pipeline's `vae` folder, and the reference beside it."""
    for name, fields in CASES.items():
        blocks = len(fields["block_out_channels"])
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
        vae = AutoencoderKL(**fields, **kinds).eval()
        state = {key: random_tensor(key, tuple(value.shape)) for key, value in vae.state_dict().items()}
        vae.load_state_dict(state)
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        index = {"_class_name": "AutoencoderOnly", "vae": ["diffusers", "AutoencoderKL"]}
        (folder / "model_index.json").write_text(json.dumps(index) + "\n")
        arrays = reference(vae)
        vae.bfloat16().save_pretrained(folder / "vae")
        save_file(arrays, folder / "reference.safetensors")
        for key, value in arrays.items():
            print(name, key, value.shape, f"std {value.std():.3f} max {np.abs(value).max():.3f}")


if __name__ == "__main__":
    main()
