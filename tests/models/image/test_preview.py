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


@pytest.fixture(scope="module", params=["autoencoder", "autoencoder_quant"])
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    checkpoint = open_checkpoint(str(PARITY_IMAGE / request.param), PARITY_IMAGE / "no-store")
    made = Autoencoder(read_autoencoder_config(component_config(checkpoint, "vae")))
    load_component(made, checkpoint, "vae", LoadChoices())
    made.prepare()
    return made


def test_a_preview_looks_like_the_decoded_picture_made_small(autoencoder: Autoencoder):
    """The fixtures' weights are random: of their pictures even the best linear map tells no more than 0.6 to 0.8."""
    scale = autoencoder.config.downscale
    latents = autoencoder.encode(mx.array(preview.drawn_picture(16 * scale, 7)[None]))
    pixels = Preview(autoencoder)(latents)
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    decoded = np.array(autoencoder.decode(latents))[0].reshape(16, scale, 16, scale, 3).mean(axis=(1, 3))
    expected = np.clip(decoded / 2 + 0.5, 0, 1) * 255
    assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.5
    mirrored = expected[::-1, ::-1]
    assert np.corrcoef(pixels.ravel(), mirrored.ravel())[0, 1] < 0.4


def test_the_map_is_fitted_once_and_always_the_same(autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch):
    latents = mx.random.normal((1, 5, 7, autoencoder.config.latent_channels), key=mx.random.key(4))
    shown = Preview(autoencoder)
    first = shown(latents)
    with monkeypatch.context() as patch:
        patch.setattr(preview, "fit_colours", None)
        np.testing.assert_array_equal(shown(latents), first)
    assert first.shape == (5, 7, 3)
    np.testing.assert_array_equal(Preview(autoencoder)(latents), first)
