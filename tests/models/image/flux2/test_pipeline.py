"""How FLUX.2 klein goes about a picture: its units of work, what it does once, and what it promises."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.image.base import ImageResult, ImageStep, LoadChoices, PictureError, PictureRequest
from models.image.flux2.pipeline import Flux2KleinPipeline, empirical_mu, load_pipeline
from models.store import CreateRequest, create_model

FOLDER = Path(__file__).parents[3] / "parity_image" / "flux2_klein"


def load(folder: Path, **choices) -> Flux2KleinPipeline:
    return load_pipeline(open_checkpoint(str(folder), folder), LoadChoices(**choices))


@pytest.fixture(scope="module")
def klein() -> Flux2KleinPipeline:
    return load(FOLDER)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Flux2KleinPipeline:
    """The same weights as a model that was not distilled."""
    folder = tmp_path_factory.mktemp("klein") / "base"
    shutil.copytree(FOLDER, folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_distilled": False}))
    return load(folder)


def photo(width: int, height: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def asked(**fields) -> PictureRequest:
    return PictureRequest(**({"prompt": "the fox", "width": 64, "height": 48, "steps": 2, "seed": 7} | fields))


def made(pipeline: Flux2KleinPipeline, **fields) -> ImageResult:
    *_, result = pipeline.generate(asked(**fields))
    assert isinstance(result, ImageResult)
    return result


def difference(one: ImageResult, other: ImageResult) -> float:
    return float(np.abs(one.pixels.astype(float) - other.pixels).mean())


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[str]:
    """A list that grows with each call of a method."""
    calls: list[str] = []
    method = getattr(owner, name)

    def count(*args, **kwargs):
        calls.append(name)
        return method(*args, **kwargs)

    monkeypatch.setattr(type(owner), name, lambda _, *args, **kwargs: count(*args, **kwargs))
    return calls


def test_each_prompt_reference_and_step_is_a_unit_and_the_picture_comes_last(klein):
    *units, result = klein.generate(asked(steps=3, images=(photo(64, 64), photo(80, 64))))
    phases = [(unit.phase, unit.step, unit.total) for unit in units if isinstance(unit, ImageStep)]
    assert phases[:3] == [("encode", 0, 3)] * 3
    assert phases[3:6] == [("denoise", 1, 3), ("denoise", 2, 3), ("denoise", 3, 3)]
    assert all(phase == ("decode", 3, 3) for phase in phases[6:])
    assert len(phases) == len(units)
    assert result.pixels.shape == (48, 64, 3)
    assert result.pixels.dtype == np.uint8
    assert result.steps_computed == 3


def test_what_no_step_changes_is_done_once(base, monkeypatch):
    encodings = counted(monkeypatch, base._autoencoder, "encode")
    conditions = counted(monkeypatch, base._transformer, "condition")
    modulations = counted(monkeypatch, base._transformer, "modulations")
    made(base, steps=4, guidance=3.0, negative_prompt="a dog", images=(photo(64, 64),))
    assert (len(encodings), len(conditions), len(modulations)) == (1, 1, 4)


def previews(pipeline: Flux2KleinPipeline, **fields) -> dict[int, np.ndarray]:
    """The previews of a run, by their steps."""
    units = [unit for unit in pipeline.generate(asked(**fields)) if isinstance(unit, ImageStep)]
    return {unit.step: unit.preview.astype(float) for unit in units if unit.preview is not None}


def test_a_preview_comes_every_so_many_steps_and_is_of_the_picture_to_be(klein):
    assert previews(klein, steps=5) == {}
    assert list(previews(klein, steps=5, preview_every=2)) == [2, 4]
    shown = previews(klein, steps=5, preview_every=1)
    assert {preview.shape for preview in shown.values()} == {(6, 8, 3)}
    errors = [float(np.abs(shown[step] - shown[5]).mean()) for step in (1, 4)]
    assert errors[0] > errors[1] > 0


def test_previews_change_nothing(klein):
    np.testing.assert_array_equal(made(klein, preview_every=1).pixels, made(klein).pixels)


def test_a_large_picture_is_decoded_in_pieces_between_which_it_can_be_given_up(klein):
    pieces = load(FOLDER, vae_tile=2)
    *units, result = pieces.generate(asked())
    assert [unit.phase for unit in units].count("decode") > 2
    assert difference(result, made(klein)) < 2


def test_the_seed_alone_decides_the_noise(klein):
    first, again, other = made(klein, seed=5), made(klein, seed=5), made(klein, seed=6)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert difference(first, other) > 5


def test_a_picture_given_up_after_a_step_leaves_the_pipeline_as_it_was(klein):
    before = made(klein)
    run = klein.generate(asked(steps=9, images=(photo(64, 64),)))
    assert [next(run).phase for _ in range(4)] == ["encode", "encode", "denoise", "denoise"]
    run.close()
    np.testing.assert_array_equal(made(klein).pixels, before.pixels)


def test_a_reference_that_cannot_be_used_is_refused_before_any_work(klein, monkeypatch):
    calls = counted(monkeypatch, klein._text_encoder, "encode")
    with pytest.raises(PictureError, match=r"images\[1\] is 40x64"):
        next(klein.generate(asked(images=(photo(64, 64), photo(40, 64)))))
    with pytest.raises(PictureError, match=r"images\[0\] is 64x600"):
        klein.default_size([photo(64, 600)])
    assert calls == []


def test_the_first_reference_sets_the_default_size(klein):
    assert klein.default_size([]) == (1024, 1024)
    assert klein.default_size([photo(203, 90), photo(64, 64)]) == (192, 80)
    assert klein.default_size([photo(2048, 2048)]) == (1024, 1024)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_up_to_1_is_none(base, klein, guidance):
    np.testing.assert_array_equal(made(base, guidance=guidance).pixels, made(klein).pixels)


def test_guidance_leads_away_from_the_negative_prompt(base):
    plain, away = made(base, guidance=3.0), made(base, guidance=3.0, negative_prompt="no shells")
    assert difference(plain, made(base)) > 5
    assert difference(plain, away) > 5


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_step_cache_computes_fewer_steps_and_never_leaves_out_the_first_and_the_last(base, guidance):
    full = made(base, steps=6, guidance=guidance)
    least = made(base, steps=6, guidance=guidance, step_cache=1e6)
    some = made(base, steps=6, guidance=guidance, step_cache=1.0)
    assert (full.steps_computed, least.steps_computed) == (6, 2)
    assert 2 < some.steps_computed < 6
    assert 0 < difference(full, some) < difference(full, least)


def test_a_step_cache_that_never_answers_changes_nothing(klein):
    cached = made(klein, steps=4, step_cache=1e-9)
    assert cached.steps_computed == 4
    np.testing.assert_array_equal(cached.pixels, made(klein, steps=4).pixels)


def test_a_text_encoder_that_is_not_kept_says_the_same(klein):
    frugal = load(FOLDER, keep_text_encoder=False)
    np.testing.assert_array_equal(made(frugal).pixels, made(klein).pixels)


def test_the_store_gives_the_picture_of_the_folder(klein, tmp_path):
    create_model(CreateRequest(name="klein", source=FOLDER, store=tmp_path))
    stored = load_pipeline(open_checkpoint("klein", tmp_path), LoadChoices())
    assert stored.abilities == klein.abilities
    np.testing.assert_array_equal(made(stored).pixels, made(klein).pixels)


def test_progress_goes_from_nothing_to_all(tmp_path):
    seen: list[float] = []
    load(FOLDER, progress=seen.append)
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.5
    assert seen[-1] == 1.0


def test_the_working_space_grows_with_size_and_references(klein):
    small, large = klein.working_bytes(asked()), klein.working_bytes(asked(width=1024, height=1024))
    edit = klein.working_bytes(asked(width=1024, height=1024, images=(photo(1024, 1024),)))
    assert 0 < small < large < edit
    # A reference of any size is shrunk first.
    assert klein.working_bytes(asked(width=1024, height=1024, images=(photo(2048, 2048),))) == edit


def test_mu_bends_where_the_large_pictures_begin():
    assert empirical_mu(4301, 4) == empirical_mu(4301, 50) == pytest.approx(0.00016927 * 4301 + 0.45666666)
    assert empirical_mu(4096, 4) > empirical_mu(4096, 50) > empirical_mu(4096, 200)
