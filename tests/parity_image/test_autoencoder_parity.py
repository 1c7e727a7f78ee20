"""Autoencoders against what diffusers makes of the same pictures and latents with tiny random checkpoints, float32."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.checkpoint import open_checkpoint
from models.image.autoencoder import Autoencoder, read_autoencoder_config
from models.image.base import LoadChoices
from models.image.loading import component_config, load_component

HERE = Path(__file__).parent
NAMES = ("autoencoder", "autoencoder_quant")
SIZES = range(3)
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Fixture:
    autoencoder: Autoencoder
    reference: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=[(name, form) for name in NAMES for form in ("mlx", "host")], ids="-".join)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    name, form = request.param
    folder = HERE / name
    checkpoint = open_checkpoint(str(folder), HERE / "no-store")
    autoencoder = Autoencoder(read_autoencoder_config(component_config(checkpoint, "vae")))
    load_component(autoencoder, checkpoint, "vae", LoadChoices())
    autoencoder.prepare(on_host=form == "host")
    assert autoencoder.on_host == (form == "host")
    return Fixture(autoencoder, load_file(folder / "reference.safetensors"))


@pytest.mark.parametrize("size", SIZES)
def test_the_decoded_picture_is_the_references(fixture: Fixture, size: int):
    picture = fixture.autoencoder.decode(mx.array(fixture.reference[f"latents.{size}"]))
    np.testing.assert_allclose(np.array(picture), fixture.reference[f"decoded.{size}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_the_encoded_latents_are_the_references(fixture: Fixture, size: int):
    latents = fixture.autoencoder.encode(mx.array(fixture.reference[f"picture.{size}"]))
    np.testing.assert_allclose(np.array(latents), fixture.reference[f"encoded.{size}"], rtol=0, atol=TOLERANCE)
