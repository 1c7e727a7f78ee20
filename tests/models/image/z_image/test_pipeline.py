"""A Z-Image run as the engine sees it; what the picture is, the parity tests compare with diffusers."""

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.errors import CheckpointError
from models.image.base import ImageResult, ImageStep, LoadChoices, PictureRequest
from models.image.z_image.pipeline import ZImagePipeline, load_pipeline

REQUEST = PictureRequest(prompt="a quick fox", width=64, height=48, steps=3, seed=11)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> ZImagePipeline:
    return load_pipeline(open_checkpoint(str(tiny_pipeline), tiny_pipeline), LoadChoices())


def picture(pipeline: ZImagePipeline, request: PictureRequest) -> np.ndarray:
    *_, result = pipeline.generate(request)
    assert isinstance(result, ImageResult)
    return result.pixels


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x // width, 255 * y // height, 128 + 0 * x], axis=-1).astype(np.uint8)


def test_each_unit_of_work_is_told(pipeline: ZImagePipeline):
    *steps, result = pipeline.generate(REQUEST)
    assert isinstance(result, ImageResult)
    assert result.pixels.shape == (48, 64, 3)
    assert result.steps_computed == 3
    told = [(step.phase, step.step, step.total) for step in steps if isinstance(step, ImageStep)]
    assert told[:4] == [("encode", 0, 3), ("denoise", 1, 3), ("denoise", 2, 3), ("denoise", 3, 3)]
    assert set(told[4:]) == {("decode", 3, 3)}


def test_the_same_request_makes_the_same_bytes_and_another_seed_others(pipeline: ZImagePipeline):
    first = picture(pipeline, REQUEST)
    np.testing.assert_array_equal(picture(pipeline, REQUEST), first)
    assert (picture(pipeline, replace(REQUEST, seed=12)) != first).any()


@pytest.mark.parametrize("units", range(5))
def test_a_run_may_be_given_up_after_any_unit(pipeline: ZImagePipeline, units: int):
    expected = picture(pipeline, REQUEST)
    run = pipeline.generate(REQUEST)
    for _ in range(units):
        next(run)
    run.close()
    np.testing.assert_array_equal(picture(pipeline, REQUEST), expected)


def test_a_run_that_is_over_leaves_nothing_behind(pipeline: ZImagePipeline):
    def active() -> int:
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    picture(pipeline, REQUEST)
    before = active()
    picture(pipeline, REQUEST)
    run = pipeline.generate(REQUEST)
    next(run)
    next(run)
    run.close()
    assert active() == before


def test_a_negative_prompt_counts_only_with_guidance(pipeline: ZImagePipeline):
    plain = picture(pipeline, REQUEST)
    np.testing.assert_array_equal(picture(pipeline, replace(REQUEST, negative_prompt="a dog")), plain)
    guided = picture(pipeline, replace(REQUEST, guidance=4.0))
    other = picture(pipeline, replace(REQUEST, guidance=4.0, negative_prompt="a dog"))
    assert (guided != plain).any()
    assert (guided != other).any()


def test_the_step_cache_skips_steps_and_counts_them(pipeline: ZImagePipeline):
    many = replace(REQUEST, steps=8, guidance=2.0)
    *steps, reused = pipeline.generate(replace(many, step_cache=0.8))
    assert isinstance(reused, ImageResult)
    assert 2 <= reused.steps_computed < 8
    assert [step.step for step in steps if isinstance(step, ImageStep) and step.phase == "denoise"] == list(range(1, 9))
    *_, careful = pipeline.generate(replace(many, step_cache=1e-6))
    assert isinstance(careful, ImageResult)
    assert careful.steps_computed == 8
    np.testing.assert_array_equal(careful.pixels, picture(pipeline, many))


def test_a_picture_to_begin_with_shows_more_the_less_strength_there_is(pipeline: ZImagePipeline):
    request = replace(REQUEST, steps=10, images=(gradient(48, 64),))
    noise = picture(pipeline, replace(REQUEST, steps=10)).astype(np.int32)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        *steps, result = pipeline.generate(replace(request, strength=strength))
        assert isinstance(result, ImageResult)
        assert [step.phase for step in steps if isinstance(step, ImageStep)].count("encode") == 2
        distances.append(np.abs(result.pixels - noise).mean())
        assert result.steps_computed == round(10 * strength)
    assert distances[0] > distances[1] > distances[2] == 0.0


def test_a_picture_of_another_shape_is_cut_not_squeezed(pipeline: ZImagePipeline):
    tall = np.concatenate([np.zeros((30, 64, 3), np.uint8), gradient(48, 64), np.zeros((30, 64, 3), np.uint8)])
    request = replace(REQUEST, strength=0.4)
    np.testing.assert_array_equal(
        picture(pipeline, replace(request, images=(tall,))),
        picture(pipeline, replace(request, images=(gradient(48, 64),))),
    )


@pytest.mark.parametrize(
    ("shape", "size"),
    [(None, (64, 64)), ((48, 64), (64, 48)), ((50, 79), (64, 48)), ((128, 128), (64, 64)), ((4000, 20), (16, 896))],
)
def test_a_picture_sets_the_default_size_within_the_models_own(
    pipeline: ZImagePipeline, shape: tuple[int, int] | None, size: tuple[int, int]
):
    images = () if shape is None else (gradient(*shape),)
    assert pipeline.default_size(images) == size


def test_a_larger_picture_needs_more_memory(pipeline: ZImagePipeline):
    sides = [pipeline.working_bytes(replace(REQUEST, width=side, height=side)) for side in (64, 512, 1024, 2048)]
    assert sides == sorted(sides)
    assert sides[-1] > 2 * sides[-2]


@pytest.mark.parametrize(
    ("component", "values", "named"),
    [("transformer", {"cap_feat_dim": 48}, "cap_feat_dim"), ("transformer", {"in_channels": 4}, "in_channels")],
)
def test_parts_that_do_not_fit_together_are_refused(
    tiny_pipeline: Path, tmp_path: Path, component: str, values: dict[str, int], named: str
):
    shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(CheckpointError, match=named):
        load_pipeline(open_checkpoint(str(tmp_path / "pipeline"), tmp_path), LoadChoices())


def test_loading_tells_its_progress(tiny_pipeline: Path):
    told: list[float] = []
    load_pipeline(open_checkpoint(str(tiny_pipeline), tiny_pipeline), LoadChoices(progress=told.append))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


def test_a_given_noise_is_taken_as_it_is(pipeline: ZImagePipeline):
    noise: Callable[[int], np.ndarray] = lambda seed: np.array(  # noqa: E731 - one expression
        mx.random.normal((1, 8, 6, 8), key=mx.random.key(seed))
    )
    given = replace(REQUEST, latents=noise(REQUEST.seed))
    np.testing.assert_array_equal(picture(pipeline, given), picture(pipeline, REQUEST))
    assert (picture(pipeline, replace(REQUEST, latents=noise(5))) != picture(pipeline, REQUEST)).any()


def test_previews_come_as_often_as_asked(pipeline: ZImagePipeline):
    *steps, result = pipeline.generate(replace(REQUEST, steps=5, preview_every=2))
    shown = [step.preview for step in steps if isinstance(step, ImageStep) and step.phase == "denoise"]
    assert [preview is not None for preview in shown] == [False, True, False, True, False]
    assert isinstance(result, ImageResult)
    np.testing.assert_array_equal(result.pixels, picture(pipeline, replace(REQUEST, steps=5)))


def test_the_last_preview_is_of_the_latents_that_are_decoded(pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch):
    decoded: list[mx.array] = []
    decode = pipeline._autoencoder.decode_steps
    monkeypatch.setattr(pipeline._autoencoder, "decode_steps", lambda x: (decoded.append(x), decode(x))[1])
    steps = list(pipeline.generate(replace(REQUEST, preview_every=3)))
    (preview,) = (step.preview for step in steps if isinstance(step, ImageStep) and step.preview is not None)
    assert preview.shape == (6, 8, 3)
    assert np.abs(preview.astype(np.int32) - pipeline._preview(decoded[0])).max() <= 1
