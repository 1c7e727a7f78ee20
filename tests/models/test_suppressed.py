import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.checkpoint import open_checkpoint
from models.errors import CheckpointError
from models.executors.base import Executor, Row, Step
from models.sampling import Draw, Drawn, Sampling
from models.suppressed import suppressed_tokens
from tests.parity.executors import EXECUTORS, HERE, load, run

FIXTURE = HERE / "llama_tied"
PROMPT = load_file(FIXTURE / "reference.safetensors")["prompt.0"].tolist()
GREEDY, WARM = Sampling(temperature=0), Sampling(temperature=5.0, top_k=0, top_p=1.0)


def checkpoint(folder: Path, suppress: object) -> Path:
    """The fixture with another generation_config.json."""
    folder.mkdir()
    for file in FIXTURE.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": suppress}))
    return folder


@pytest.mark.parametrize(
    ("said", "found"), [([7, 3, 7], (3, 7)), ([], ()), (None, ()), ([-1, 299, 300, 10**9], (299,))], ids=str
)
def test_ids_that_the_vocabulary_does_not_have_are_passed_over(tmp_path: Path, said: object, found: tuple[int, ...]):
    assert suppressed_tokens(open_checkpoint(str(checkpoint(tmp_path / "m", said)), HERE), 300) == found


@pytest.mark.parametrize("wrong", [7, "7", ["a"], [1.5], [True]], ids=str)
def test_what_is_no_list_of_ids_is_refused_by_name(tmp_path: Path, wrong: object):
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*suppress_tokens"):
        suppressed_tokens(open_checkpoint(str(checkpoint(tmp_path / "m", wrong)), HERE), 300)


@pytest.fixture(params=EXECUTORS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Executor, np.ndarray, list[int]]:
    """An executor that is not to say what it would say at each of the last three places; what logits would be."""
    plain = load(FIXTURE, request.param)
    (logits,) = run(plain, (0, 0, PROMPT))
    plain.close()
    best = sorted(set(logits[-3:].argmax(axis=1).tolist()))
    return load(checkpoint(tmp_path / "m", [*best, 100_000]), request.param), logits, best


def drawn(executor: Executor, *draws: Draw) -> list[Drawn]:
    """What is drawn at the last places of the prompt, as many as there are draws."""
    logits = executor.forward(Step((Row(0, 0, tuple(PROMPT), len(draws)),)))
    assert logits is not None
    return executor.sample(logits, draws).read()


def test_their_logits_are_minus_infinity_and_the_others_are_what_they_were(
    pair: tuple[Executor, np.ndarray, list[int]],
):
    executor, plain, best = pair
    (logits,) = run(executor, (0, 0, PROMPT))
    assert np.isneginf(logits[:, best]).all()
    others = np.delete(np.arange(plain.shape[1]), best)
    np.testing.assert_array_equal(logits[:, others], plain[:, others])


def test_drafted_places_and_the_next_are_greedy_among_the_rest(pair: tuple[Executor, np.ndarray, list[int]]):
    executor, plain, best = pair
    rest = plain[-3:].copy()
    rest[:, best] = -np.inf
    found = drawn(executor, *[Draw(GREEDY, 0.0, 0)] * 3)
    assert [each.token for each in found] == rest.argmax(axis=1).tolist()


def test_no_draw_finds_them(pair: tuple[Executor, np.ndarray, list[int]]):
    executor, _, best = pair
    for uniform in np.linspace(0, 1, 23, endpoint=False):
        (found,) = drawn(executor, Draw(WARM, float(uniform), 0))
        assert found.token not in best


def test_log_probabilities_are_those_of_the_rest(pair: tuple[Executor, np.ndarray, list[int]]):
    executor, plain, best = pair
    (found,) = drawn(executor, Draw(GREEDY, 0.0, 0, top_logprobs=5))
    rest = np.delete(plain[-1].astype(np.float64), best)
    expected = np.sort(rest - np.log(np.exp(rest).sum()))[::-1][:5]
    np.testing.assert_allclose([value for _, value in found.top], expected, atol=1e-4)
    assert found.logprob == pytest.approx(expected[0], abs=1e-4)
    assert not {token for token, _ in found.top} & set(best)


def test_a_constraint_that_allows_them_does_not_bring_them_back(pair: tuple[Executor, np.ndarray, list[int]]):
    executor, _, best = pair
    allowed = np.zeros(304, np.uint8)
    other = next(token for token in range(300) if token not in best)
    allowed[[*best, other]] = 1
    mask = np.packbits(allowed, bitorder="little").tobytes()
    (found,) = drawn(executor, Draw(GREEDY, 0.0, 0, mask=mask))
    assert found.token == other
