"""FLUX.2 klein against what diffusers says of a tiny random pipeline: each part by itself, then whole runs.

`make_flux2.py` made checkpoint and goldens. All comparisons are in float32; each form of the transformer passes them.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.image import autoencoder as autoencoder_module
from models.image import host_layers
from models.image.base import ImageResult, LoadChoices, PictureRequest, Pixels
from models.image.flux2 import pipeline as klein
from models.image.flux2 import transformer as transformer_module
from models.image.flux2.autoencoder import Flux2Autoencoder, build_autoencoder
from models.image.flux2.config import transformer_config
from models.image.flux2.references import prepare_reference
from models.image.flux2.transformer import Denoiser, Transformer
from models.image.loading import component_config, load_component
from models.image.schedulers import flow_match_sigmas
from models.image.text_encoder import TextEncoder

FOLDER = Path(__file__).parent / "flux2_klein"
PROMPT, NEGATIVE, GUIDANCE = "the quick brown fox jumps over the sea", "no lazy dog, no shells", 3.0
TOLERANCE = 1e-4
# The pipeline hands out bytes: where the reference lies near the middle of two, the last bits decide.
PIXEL_TOLERANCE = 2e-4
FORMS = ("plain", "host", "unbounded")
SHAPES = ("square", "wide", "tall", "references")
DISTILLED_RUNS = ("square", "wide", "tall", "one_reference", "two_references")

Goldens = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def goldens() -> Goldens:
    with np.load(FOLDER / "goldens.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a model that was not distilled."""
    folder = tmp_path_factory.mktemp("klein") / "base"
    shutil.copytree(FOLDER, folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_distilled": False}))
    return folder


def load_transformer(form: str) -> Denoiser:
    checkpoint = open_checkpoint(str(FOLDER), FOLDER)
    transformer = Transformer(transformer_config(checkpoint))
    load_component(transformer, checkpoint, "transformer", LoadChoices())
    if form != "plain":
        transformer.prepare()
    return transformer


def load_autoencoder() -> Flux2Autoencoder:
    checkpoint = open_checkpoint(str(FOLDER), FOLDER)
    autoencoder = build_autoencoder(component_config(checkpoint, "vae"))
    load_component(autoencoder, checkpoint, "vae", LoadChoices(), unused=("bn.num_batches_tracked",))
    autoencoder.prepare()
    return autoencoder


def assert_close(ours: mx.array, reference: np.ndarray, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(np.array(ours) - reference)
    assert difference.shape == reference.shape
    assert difference.max() < tolerance * max(1.0, float(np.abs(reference).max()))


@pytest.mark.parametrize(("name", "prompt"), [("prompt", PROMPT), ("blank", ""), ("truncated", "the fox " * 700)])
def test_the_text_encoder_makes_512_embeddings_of_three_layers(goldens: Goldens, name: str, prompt: str) -> None:
    checkpoint = open_checkpoint(str(FOLDER), FOLDER)
    (embeddings,) = TextEncoder(checkpoint, klein.READING, LoadChoices()).encode(prompt)
    assert embeddings.shape == (512, 48)
    assert_close(embeddings[mx.array(goldens["text.rows"])], goldens[f"text.{name}"])


def test_the_noise_levels_are_those_of_the_scheduler(goldens: Goldens) -> None:
    keys = [key for key in goldens if key.startswith("sigmas.")]
    assert len(keys) > 5
    for key in keys:
        _, tokens, steps = key.split(".")
        ours = flow_match_sigmas(int(steps), mu=klein.empirical_mu(int(tokens), int(steps)))
        np.testing.assert_allclose(ours, goldens[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_forward_pass_is_the_references(
    goldens: Goldens, shape: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "unbounded":
        monkeypatch.setattr(host_layers, "SAFE_SCORE", 0.0)
    transformer = load_transformer(form)
    grid, *others = [(int(h), int(w)) for h, w in goldens[f"forward.{shape}.grids"]]
    parts = np.cumsum([0, *(h * w for h, w in (grid, *others))])
    tokens = mx.array(goldens[f"forward.{shape}.tokens"])
    references = [(tokens[parts[n + 1] : parts[n + 2]], each) for n, each in enumerate(others)]
    (conditions,) = transformer.condition([mx.array(goldens["forward.text"])], references, grid)
    modulations = transformer.modulations(float(np.float32(0.6)))
    output = transformer(tokens[: parts[1]], modulations, conditions)
    assert_close(output, goldens[f"forward.{shape}.output"])


def test_the_autoencoder_encodes_to_normalised_patches(goldens: Goldens) -> None:
    latents = load_autoencoder().encode(mx.array(goldens["vae.pixels"])[None])
    assert_close(latents.transpose(0, 3, 1, 2), goldens["vae.encoded"])


def test_the_autoencoder_decodes_normalised_patches(goldens: Goldens) -> None:
    picture = load_autoencoder().decode(mx.array(goldens["vae.latents"]).transpose(0, 2, 3, 1))
    assert_close(picture[0], goldens["vae.decoded"])


@pytest.mark.parametrize("name", ["small", "large", "long"])
def test_a_reference_picture_is_shrunk_and_cropped_as_the_reference_does(goldens: Goldens, name: str) -> None:
    image = np.tile(goldens["picture.0"], goldens[f"reference.{name}.repeats"])
    prepared = prepare_reference(image, 16)
    height, width = prepared.shape[:2]
    assert [width, height] == goldens[f"reference.{name}.size"].tolist()
    values = prepared.astype(np.float32) / 127.5 - 1.0
    means = values.reshape(height // 16, 16, width // 16, 16, 3).mean(axis=(1, 3))
    # Half a level: releases of Pillow may round its filter in other ways.
    np.testing.assert_allclose(means, goldens[f"reference.{name}.means"], atol=0.5 / 127.5)


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run: what was asked, the latents behind the last step, the picture."""

    latents: np.ndarray
    pixels: Pixels


def run(folder: Path, goldens: Goldens, name: str, **changes: object) -> Run:
    pipeline = klein.load_pipeline(open_checkpoint(str(folder), folder), LoadChoices())
    seen: list[mx.array] = []
    decode = pipeline._autoencoder.decode_steps
    pipeline._autoencoder.decode_steps = recording(seen, decode)
    width, height = goldens[f"run.{name}.size"].tolist()
    fields = {
        "prompt": PROMPT,
        "width": width,
        "height": height,
        "steps": 2,
        "seed": 1,
        "images": tuple(goldens[f"picture.{index}"] for index in goldens[f"run.{name}.references"]),
        "latents": goldens[f"run.{name}.noise"],
    }
    *_, result = pipeline.generate(PictureRequest(**(fields | changes)))
    assert isinstance(result, ImageResult)
    return Run(np.array(seen[0]).reshape(-1, seen[0].shape[-1]), result.pixels)


def recording(
    seen: list[mx.array], decode: Callable[[mx.array], Iterator[mx.array | None]]
) -> Callable[[mx.array], Iterator[mx.array | None]]:
    def record(latents: mx.array) -> Iterator[mx.array | None]:
        seen.append(latents)
        yield from decode(latents)

    return record


def assert_same(ours: Run, goldens: Goldens, name: str) -> None:
    assert_close(mx.array(ours.latents), goldens[f"run.{name}.latents"])
    reference = goldens[f"run.{name}.pixels"]
    assert ours.pixels.shape == reference.shape
    difference = np.abs(ours.pixels.astype(np.int16) - reference) / 255
    assert difference.mean() < PIXEL_TOLERANCE
    assert difference.max() <= 1 / 255


@pytest.mark.parametrize("name", DISTILLED_RUNS)
@pytest.mark.parametrize("form", ["plain", "host"])
def test_a_whole_run_makes_the_references_picture(
    goldens: Goldens, name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "plain":
        for module in (transformer_module, autoencoder_module):
            monkeypatch.setattr(module, "host_gemm", lambda: None)
    assert_same(run(FOLDER, goldens, name), goldens, name)


def test_a_guided_run_makes_the_references_picture(goldens: Goldens, base_folder: Path) -> None:
    ours = run(base_folder, goldens, "guided", guidance=GUIDANCE, negative_prompt=NEGATIVE)
    assert_same(ours, goldens, "guided")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("square", {"prompt": "the fox"}),
        ("one_reference", {"images": ()}),
        ("two_references", {"prompt": PROMPT + "."}),
        ("square", {"steps": 3}),
    ],
)
def test_another_request_makes_another_picture(goldens: Goldens, name: str, changes: dict[str, object]) -> None:
    ours = run(FOLDER, goldens, name, **changes)
    reference = goldens[f"run.{name}.pixels"].astype(np.int16)
    assert np.abs(ours.pixels.astype(np.int16) - reference).mean() / 255 > 10 * PIXEL_TOLERANCE


def test_the_order_of_references_matters(goldens: Goldens) -> None:
    swapped = run(FOLDER, goldens, "two_references", images=(goldens["picture.1"], goldens["picture.0"]))
    reference = goldens["run.two_references.pixels"].astype(np.int16)
    assert np.abs(swapped.pixels.astype(np.int16) - reference).mean() / 255 > 10 * PIXEL_TOLERANCE
