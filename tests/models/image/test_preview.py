from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.image import preview
from models.image.autoencoder import Autoencoder, read_autoencoder_config
from models.image.base import LoadChoices
from models.image.loading import component_config, load_component
from models.image.preview import Preview

PARITY_IMAGE = Path(__file__).parents[2] / "parity_image"


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    """Random weights, but blocks add nothing to what goes past them: random ones would make pictures of no likeness."""
    checkpoint = open_checkpoint(str(PARITY_IMAGE / "autoencoder"), PARITY_IMAGE / "no-store")
    made = Autoencoder(read_autoencoder_config(component_config(checkpoint, "vae")))
    load_component(made, checkpoint, "vae", LoadChoices())
    for name, module in made.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            module.update({"weight": mx.zeros_like(module.weight), "bias": mx.zeros_like(module.bias)})
    made.prepare()
    return made


def test_a_preview_looks_like_the_decoded_picture_made_small(autoencoder: Autoencoder):
    scale = autoencoder.config.downscale
    y, x = np.mgrid[: 16 * scale, : 16 * scale] / (16 * scale)
    slopes = np.stack([2 * x - 1, 1 - 2 * y, np.sign(x - y)], axis=-1)
    latents = autoencoder.encode(mx.array(slopes[None].astype(np.float32)))
    pixels = Preview(autoencoder)(latents)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    decoded = np.array(autoencoder.decode(latents))[0].reshape(16, scale, 16, scale, 3).mean(axis=(1, 3))
    assert alike(pixels, decoded) > 0.7
    assert alike(pixels, decoded[::-1, ::-1]) < 0


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two pictures, each colour about its own mean."""
    pair = [picture - picture.mean(axis=(0, 1)) for picture in (one, other)]
    return float(np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1])


def test_the_map_is_fitted_once_and_always_the_same(autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch):
    latents = mx.random.normal((1, 5, 7, autoencoder.config.latent_channels), key=mx.random.key(4))
    shown = Preview(autoencoder)
    first = shown(latents)
    with monkeypatch.context() as patch:
        patch.setattr(preview, "fit_colours", None)
        np.testing.assert_array_equal(shown(latents), first)
    assert first.shape == (5, 7, 3)
    np.testing.assert_array_equal(Preview(autoencoder)(latents), first)
