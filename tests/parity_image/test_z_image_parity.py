"""Z-Image against what diffusers says of a tiny random pipeline: each part by itself, then whole runs.

`make_z_image.py` made checkpoint and goldens. All comparisons are in float32; each form of the transformer passes them.
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.image import find_family
from models.image.base import ImageResult, ImageStep, LoadChoices, PictureRequest
from models.image.gemm import host_gemm
from models.image.loading import component_config, load_component
from models.image.schedulers import FlowMatchEuler
from models.image.text_encoder import TextEncoder
from models.image.z_image import pipeline as z_image
from models.image.z_image.config import read_transformer_config
from models.image.z_image.transformer import Side, Transformer, patchify, unpatchify

FOLDER = Path(__file__).parent / "z_image"
PROMPT, NEGATIVE = "the quick brown fox jumps over the sea", "no lazy dog"
TOLERANCE = 1e-4
FORMS = ("plain", "host")
FORWARDS = ("square", "wide", "tall", "exact")
# Steps, guidance and strength of each run, as `make_z_image.py` has them.
RUNS = {
    "square": (2, 0.0, 0.6),
    "wide": (2, 0.0, 0.6),
    "tall": (3, 0.0, 0.6),
    "guided": (2, 3.0, 0.6),
    "from_picture": (4, 0.0, 0.6),
    "from_picture_guided": (3, 2.5, 0.9),
}

Goldens = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def goldens() -> Goldens:
    with np.load(FOLDER / "goldens.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=FORMS)
def transformer(request: pytest.FixtureRequest) -> Transformer:
    checkpoint = open_checkpoint(str(FOLDER), FOLDER)
    model = Transformer(read_transformer_config(component_config(checkpoint, "transformer")))
    load_component(model, checkpoint, "transformer", LoadChoices())
    if request.param == "host" and host_gemm() is None:
        pytest.skip("needs a fast BLAS")
    model.prepare(on_host=request.param == "host")
    return model


@pytest.fixture(scope="module")
def pipeline() -> z_image.ZImagePipeline:
    return z_image.load_pipeline(open_checkpoint(str(FOLDER), FOLDER), LoadChoices())


def assert_close(ours: mx.array, reference: np.ndarray, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(np.array(ours) - reference)
    assert difference.shape == reference.shape
    assert difference.max() < tolerance * max(1.0, float(np.abs(reference).max()))


@pytest.mark.parametrize(("name", "prompt"), [("prompt", PROMPT), ("blank", "")])
def test_the_text_encoder_gives_the_valid_tokens_before_the_last_layer(
    goldens: Goldens, name: str, prompt: str
) -> None:
    (embeddings,) = TextEncoder(open_checkpoint(str(FOLDER), FOLDER), z_image.READING, LoadChoices()).encode(prompt)
    assert_close(embeddings, goldens[f"text.{name}"])


def test_a_long_prompt_is_cut_at_512_tokens(goldens: Goldens) -> None:
    encoder = TextEncoder(open_checkpoint(str(FOLDER), FOLDER), z_image.READING, LoadChoices())
    (embeddings,) = encoder.encode("the fox " * 700)
    assert embeddings.shape == tuple(goldens["text.truncated.shape"]) == (512, 32)
    assert_close(embeddings[-8:], goldens["text.truncated"])


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("none", FlowMatchEuler()),
        ("static", FlowMatchEuler(shift=3.0)),
        ("exponential", FlowMatchEuler(dynamic=True)),
        ("linear", FlowMatchEuler(dynamic=True, time_shift="linear")),
        ("terminal", FlowMatchEuler(dynamic=True, shift_terminal=0.02)),
    ],
)
def test_the_noise_levels_are_those_of_the_scheduler(goldens: Goldens, kind: str, scheduler: FlowMatchEuler) -> None:
    keys = [key for key in goldens if key.startswith(f"sigmas.{kind}.")]
    assert len(keys) == 3
    for key in keys:
        steps, tokens = (int(part) for part in key.split(".")[2:])
        ours = scheduler.sigmas(steps, scheduler.mu(tokens))
        np.testing.assert_allclose(ours, goldens[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FORWARDS)
def test_every_part_of_a_forward_pass_is_the_references(goldens: Goldens, transformer: Transformer, name: str) -> None:
    def golden(part: str) -> np.ndarray:
        return goldens[f"forward.{name}.{part}"]

    latents = mx.array(golden("latents")).transpose(1, 2, 0)
    known = transformer.condition(mx.array(golden("embeddings")), latents.shape[0], latents.shape[1])
    assert_close(known.caption, golden("caption"))
    time = transformer.t_embedder(float(np.float32(0.3)) * 1000.0)
    assert_close(time[0], golden("time"))
    tokens = transformer.embed(latents, time.dtype)
    refined = transformer.refine(tokens, time, known)
    assert_close(refined, golden("image"))
    assert_close(transformer.joint(refined, time, known), golden("hidden"))
    (output,) = transformer(latents, float(np.float32(0.3)), [Side(known)])
    assert_close(output.transpose(2, 0, 1), golden("output"))


def test_patches_are_put_back_where_they_came_from() -> None:
    latents = mx.random.normal((4, 6, 3), key=mx.random.key(1))
    tokens = patchify(latents)
    # Channels vary fastest, then the columns of a patch.
    np.testing.assert_array_equal(np.array(tokens[1, 3:6]), np.array(latents[0, 3]))
    np.testing.assert_array_equal(np.array(unpatchify(tokens, 4, 6)), np.array(latents))


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_makes_the_references_picture(
    goldens: Goldens, pipeline: z_image.ZImagePipeline, name: str
) -> None:
    *steps, result = pipeline.generate(request_of(goldens, name))
    assert isinstance(result, ImageResult)
    expected = goldens[f"run.{name}.pixels"]
    assert result.pixels.shape == expected.shape
    difference = np.abs(result.pixels.astype(np.int32) - expected)
    assert difference.mean() < 0.02
    assert difference.max() <= 1
    denoising = [step for step in steps if isinstance(step, ImageStep) and step.phase == "denoise"]
    count = int(goldens[f"run.{name}.steps"])
    assert [(step.step, step.total) for step in denoising] == [(n + 1, count) for n in range(count)]
    assert result.steps_computed == count


@pytest.mark.parametrize("name", RUNS)
def test_the_last_latents_are_the_references(
    goldens: Goldens, pipeline: z_image.ZImagePipeline, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[mx.array] = []
    decode = pipeline._autoencoder.decode_steps
    monkeypatch.setattr(pipeline._autoencoder, "decode_steps", watched(decode, seen))
    list(pipeline.generate(request_of(goldens, name)))
    assert_close(seen[0].transpose(0, 3, 1, 2), goldens[f"run.{name}.latents"])


def watched(decode: Callable[[mx.array], object], seen: list[mx.array]) -> Callable[[mx.array], object]:
    def run(latents: mx.array) -> object:
        seen.append(latents)
        return decode(latents)

    return run


def request_of(goldens: Goldens, name: str) -> PictureRequest:
    steps, guidance, strength = RUNS[name]
    height, width = goldens[f"run.{name}.pixels"].shape[:2]
    picture = goldens.get(f"run.{name}.picture")
    return PictureRequest(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        width=width,
        height=height,
        steps=steps,
        seed=0,
        guidance=guidance,
        images=() if picture is None else (picture,),
        strength=strength,
        latents=goldens[f"run.{name}.noise"],
    )


def test_the_family_is_found_by_the_pipelines_name() -> None:
    assert find_family(open_checkpoint(str(FOLDER), FOLDER).config) is z_image.FAMILY
