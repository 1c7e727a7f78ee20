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
from models.image.tiling import Tiling

HERE = Path(__file__).parent
NAMES = ("autoencoder", "autoencoder_quant")
SIZES = range(3)
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Fixture:
    autoencoder: Autoencoder
    reference: dict[str, np.ndarray]


FORMS = [(name, form) for name in NAMES for form in ("mlx", "host")]


def load(name: str, form: str, tiling: Tiling | None = None) -> Fixture:
    folder = HERE / name
    checkpoint = open_checkpoint(str(folder), HERE / "no-store")
    autoencoder = Autoencoder(read_autoencoder_config(component_config(checkpoint, "vae")), tiling)
    load_component(autoencoder, checkpoint, "vae", LoadChoices())
    autoencoder.prepare(on_host=form == "host")
    assert autoencoder.on_host == (form == "host")
    return Fixture(autoencoder, load_file(folder / "reference.safetensors"))


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return load(*request.param)


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def in_strips(request: pytest.FixtureRequest) -> Fixture:
    """Every picture above one latent is cut, into strips of a few rows."""
    return load(*request.param, tiling=Tiling(1))


@pytest.mark.parametrize("size", SIZES)
def test_the_decoded_picture_is_the_references(fixture: Fixture, size: int):
    picture = fixture.autoencoder.decode(mx.array(fixture.reference[f"latents.{size}"]))
    np.testing.assert_allclose(np.array(picture), fixture.reference[f"decoded.{size}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_the_encoded_latents_are_the_references(fixture: Fixture, size: int):
    latents = fixture.autoencoder.encode(mx.array(fixture.reference[f"picture.{size}"]))
    np.testing.assert_allclose(np.array(latents), fixture.reference[f"encoded.{size}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_decoded_in_strips_is_the_references_within_what_bfloat16_can_hold(in_strips: Fixture, size: int):
    picture = in_strips.autoencoder.decode(mx.array(in_strips.reference[f"latents.{size}"]))
    assert bytes_apart(np.array(picture), in_strips.reference[f"decoded.{size}"]).mean() < 0.5


@pytest.mark.parametrize("size", SIZES)
def test_latents_encoded_in_strips_are_the_references_within_what_bfloat16_can_hold(in_strips: Fixture, size: int):
    latents = in_strips.autoencoder.encode(mx.array(in_strips.reference[f"picture.{size}"]))
    expected = in_strips.reference[f"encoded.{size}"]
    assert np.abs(np.array(latents) - expected).mean() < 0.01 * expected.std()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_strips_leave_no_seams(name: str, form: str):
    """On latents whose statistics change over the picture, which is what spoils tiles decoded by themselves."""
    whole, cut = load(name, form), load(name, form, Tiling(4))
    channels = whole.autoencoder.config.latent_channels
    generator = np.random.default_rng(3)
    latents = generator.normal(0, 1, (1, 40, 24, channels)) * np.linspace(0.2, 2.0, 40)[:, None, None]
    latents[:, :, 12:] += 0.8
    given = mx.array(latents.astype(np.float32))
    units = list(cut.autoencoder.decode_steps(given))
    assert len(units) > 5
    assert all(unit is None for unit in units[:-1])
    assert units[-1] is not None
    apart = bytes_apart(np.array(units[-1]), np.array(whole.autoencoder.decode(given)))
    assert apart.mean() < 0.5
    # Strips of every level end at multiples of some power of two; no row of pixels stands out.
    rows = apart.mean(axis=(0, 2, 3))
    assert rows.max() < 3 * np.median(rows) + 0.05


def bytes_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The distance of two pictures, each pixel and channel by itself, on the scale of 255."""
    pair = [np.clip(picture / 2 + 0.5, 0, 1) * 255 for picture in (one, other)]
    return np.abs(pair[0] - pair[1])
