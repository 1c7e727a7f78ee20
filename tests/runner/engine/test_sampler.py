from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from runner.engine.sampler import INVALID_TOKEN, RowSampler, _greatest, sample_rows
from runner.engine.types import SamplingParams

OFF = {"top_k": 0, "top_p": 0.0, "temperature": 1.0}
GREEDY = SamplingParams(temperature=0)
LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -3.0, -9.0], dtype=np.float32)


def sampler(params: SamplingParams = GREEDY, *, seed: int = 1, prompt: list[int] | None = None, **more) -> RowSampler:
    return RowSampler(params, seed=seed, prompt=prompt or [0], context=64, **more)


def draw(params: SamplingParams, count: int = 400, logits: np.ndarray = LOGITS, *, seed: int = 1) -> list[int]:
    """Draw again and again from the same logits, the sampler remembering nothing of it."""
    one = sampler(params, seed=seed)
    row = mx.array(logits)
    return mx.concatenate([one.sample(row) for _ in range(count)]).tolist()


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def check_frequencies(drawn: list[int], expected: np.ndarray) -> None:
    counts = Counter(drawn)
    assert set(counts) <= set(np.flatnonzero(expected)), "something ruled out was drawn"
    for token, probability in enumerate(expected):
        spread = 5 * np.sqrt(len(drawn) * probability * (1 - probability)) + 1e-9
        assert abs(counts[token] - len(drawn) * probability) <= spread


def only(tokens: list[int], probabilities: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(probabilities)
    kept[tokens] = probabilities[tokens]
    return kept / kept.sum()


# --- drawing


def test_temperature_zero_takes_the_greatest():
    logits = mx.array(np.stack([LOGITS, LOGITS[::-1]]))
    assert sample_rows(logits, [sampler(), sampler()]).read() == ([0, 7], {})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_shapes_the_distribution(temperature: float):
    params = SamplingParams(top_k=0, top_p=0, temperature=temperature)
    check_frequencies(draw(params, 1500), softmax(LOGITS / temperature))


@pytest.mark.parametrize("top_k", [1, 3, 8, 1000])
def test_top_k_leaves_the_k_greatest(top_k: int):
    params = SamplingParams(**OFF | {"top_k": top_k, "temperature": 2.0})
    check_frequencies(draw(params), only(list(range(min(top_k, 8))), softmax(LOGITS / 2)))


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_p_leaves_the_fewest_that_reach_the_mass(top_k: int):
    # 0.45, 0.27, 0.17, 0.10: the third is still needed for 0.8.
    params = SamplingParams(top_k=top_k, top_p=0.8, temperature=1.0)
    check_frequencies(draw(params), only([0, 1, 2], softmax(LOGITS)))


def test_temperature_comes_before_top_p():
    flat = SamplingParams(top_k=0, top_p=0.5, temperature=5.0)
    assert set(draw(flat)) == {0, 1, 2}
    sharp = SamplingParams(top_k=0, top_p=0.5, temperature=0.2)
    assert set(draw(sharp)) == {0}


def test_min_p_is_a_share_of_the_most_probable():
    # exp(-1.5) = 0.22, exp(-2) = 0.14.
    check_frequencies(draw(SamplingParams(**OFF | {"min_p": 0.2})), only([0, 1, 2, 3], softmax(LOGITS)))
    assert set(draw(SamplingParams(**OFF | {"min_p": 5.0}))) == {0}


def test_typical_p_prefers_tokens_of_expected_surprise():
    probabilities = softmax(LOGITS)
    surprise = -np.log(probabilities)
    order = np.argsort(np.abs(surprise - (probabilities * surprise).sum()), kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < 0.4].tolist()
    assert 0 not in kept, "the most probable token is not a typical one here"
    check_frequencies(draw(SamplingParams(**OFF | {"typical_p": 0.4})), only(kept, probabilities))


def test_top_p_is_a_share_of_what_typical_p_left():
    both = SamplingParams(**OFF | {"typical_p": 0.4, "top_p": 0.5})
    # Tokens 1 and 2 are the typical ones; of the two, 1 alone has more than half.
    assert set(draw(SamplingParams(**OFF | {"typical_p": 0.4}))) == {1, 2}
    assert set(draw(both)) == {1}


def test_a_tiny_temperature_is_as_good_as_none():
    assert set(draw(SamplingParams(temperature=1e-30))) == {0}


def test_logits_of_minus_infinity_are_never_drawn():
    logits = np.where(np.arange(8) == 3, 0.0, -np.inf).astype(np.float32)
    for params in (SamplingParams(), SamplingParams(**OFF), SamplingParams(**OFF | {"typical_p": 0.5, "min_p": 0.1})):
        assert set(draw(params, 20, logits)) == {3}


# --- seeds


def test_the_same_seed_draws_the_same_and_another_seed_something_else():
    params = SamplingParams(**OFF)
    assert draw(params, 50, seed=3) == draw(params, 50, seed=3)
    assert draw(params, 50, seed=3) != draw(params, 50, seed=4)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, 2**70])
def test_any_number_is_a_seed(seed: int):
    assert len(draw(SamplingParams(**OFF), 3, seed=seed)) == 3


def test_a_row_draws_the_same_in_any_company():
    params = [SamplingParams(**OFF), SamplingParams(), SamplingParams(**OFF | {"typical_p": 0.7})]
    logits = mx.array(np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32))
    alone = []
    for index, each in enumerate(params):
        one = sampler(each, seed=index)
        alone.append([sample_rows(logits[index : index + 1], [one]).read()[0][0] for _ in range(10)])
    rows = [sampler(each, seed=index) for index, each in enumerate(params)]
    together = [sample_rows(logits, rows).read()[0] for _ in range(10)]
    assert np.array(together).T.tolist() == alone


# --- penalties


def greedy_with(history: list[int], logits: np.ndarray = LOGITS, **penalties: float) -> int:
    one = sampler(SamplingParams(temperature=0, **penalties), prompt=history)
    return one.sample(mx.array(logits)).item()


def test_repeat_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    assert greedy_with([0, 0, 0], repeat_penalty=1.2) == 0, "2 / 1.2 is still the greatest: repeats count once"
    assert greedy_with([0, 0, 0], repeat_penalty=1.5) == 1
    assert greedy_with([0], np.array([-1.0, -1.5], dtype=np.float32), repeat_penalty=2.0) == 1


def test_presence_penalty_counts_once_and_frequency_penalty_each_time():
    assert greedy_with([0, 0, 0], presence_penalty=0.4) == 0
    assert greedy_with([0, 0, 0], presence_penalty=0.6) == 1
    assert greedy_with([0], frequency_penalty=0.2) == 0
    assert greedy_with([0, 0, 0], frequency_penalty=0.2) == 1


def test_penalties_look_back_no_farther_than_they_should():
    assert greedy_with([0, 5, 5], presence_penalty=9, repeat_last_n=2) == 0
    assert greedy_with([0, 5, 5], presence_penalty=9, repeat_last_n=3) == 1
    assert greedy_with([0, *[5] * 50], presence_penalty=9, repeat_last_n=-1) == 1
    assert greedy_with([0, 5, 5], presence_penalty=9, repeat_last_n=0) == 0


def test_what_was_drawn_is_penalized_before_the_host_has_read_it():
    one = sampler(SamplingParams(temperature=0, presence_penalty=100, repeat_last_n=3), prompt=[7])
    row = mx.array(LOGITS)
    # Each token is out of bounds for three draws, then the greatest comes round again.
    assert mx.concatenate([one.sample(row) for _ in range(8)]).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_penalty_of_zero_or_one_is_none():
    for value in (0.0, 1.0):
        assert sampler(SamplingParams(temperature=0, repeat_penalty=value)).takes_the_maximum


# --- what is not a number


def test_a_row_without_finite_logits_is_marked_and_the_others_are_not():
    bad = [np.nan, np.inf, -np.inf]
    rows = [LOGITS, *[np.where(np.arange(8) == 5, value, LOGITS) for value in bad[:2]], np.full(8, bad[2]), LOGITS]
    logits = mx.array(np.stack(rows).astype(np.float32))
    expected = [0, INVALID_TOKEN, INVALID_TOKEN, INVALID_TOKEN, 0]
    assert sample_rows(logits, [sampler() for _ in rows]).read()[0] == expected
    drawing = [sampler(SamplingParams(top_k=1)) for _ in rows]
    assert sample_rows(logits, drawing).read()[0] == expected


# --- log-probabilities


def test_logprobs_are_those_of_the_unmodified_distribution():
    params = SamplingParams(temperature=0.1, top_k=2, presence_penalty=5.0, seed=1)
    rows = [sampler(), sampler(params, prompt=[0], top_logprobs=4), sampler(params, prompt=[1], top_logprobs=0)]
    tokens, logprobs = sample_rows(mx.array(np.stack([LOGITS] * 3)), rows).read()
    expected = np.log(softmax(LOGITS))
    assert set(logprobs) == {1, 2}
    assert logprobs[1].chosen == pytest.approx(expected[tokens[1]], abs=1e-5)
    assert [token for token, _ in logprobs[1].top] == [0, 1, 2, 3]
    assert [value for _, value in logprobs[1].top] == pytest.approx(expected[:4], abs=1e-5)
    assert logprobs[2].top == ()


def test_more_alternatives_than_tokens_are_all_tokens():
    _, logprobs = sample_rows(mx.array(LOGITS[None, :3]), [sampler(top_logprobs=20)]).read()
    assert [token for token, _ in logprobs[0].top] == [0, 1, 2]


# --- the greatest


@pytest.mark.parametrize("size", [50, 8192, 10_001])
@pytest.mark.parametrize("count", [1, 40])
def test_the_greatest_are_found_in_falling_order(size: int, count: int):
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    ids, scores = _greatest(mx.array(values), count)
    best = np.argsort(-values)[:count]
    assert ids.tolist() == best.tolist()
    assert np.array_equal(np.array(scores), values[best])


def test_the_greatest_may_all_lie_in_one_block_or_be_alike():
    values = np.zeros(10_000, dtype=np.float32)
    values[640:680] = np.arange(1, 41)
    ids, _ = _greatest(mx.array(values), 40)
    assert ids.tolist() == list(range(679, 639, -1))
    ids, scores = _greatest(mx.zeros((10_000,)), 40)
    assert len(set(ids.tolist())) == 40
    assert scores.tolist() == [0.0] * 40


# --- taking back


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=0, top_p=0),
        SamplingParams(temperature=0, frequency_penalty=3.0),
        SamplingParams(temperature=2.0, repeat_penalty=1.5, presence_penalty=1.0, repeat_last_n=3),
        GREEDY,
    ],
    ids=str,
)
def test_draws_that_were_taken_back_are_drawn_again(params: SamplingParams):
    row = mx.array(LOGITS)
    plain, rewound = sampler(params, seed=3), sampler(params, seed=3, rewinds=4)
    expected = [plain.sample(row).item() for _ in range(12)]
    drawn = [rewound.sample(row).item() for _ in range(5)]
    rewound.rewind(0)
    for back in (4, 1, 2):
        rewound.rewind(back)
        del drawn[len(drawn) - back :]
        drawn += sample_rows(mx.stack([row] * 4), [rewound] * 4).read()[0]
    assert drawn == expected[: len(drawn)]
    assert len(drawn) == 10


def test_a_run_is_penalized_for_its_own_tokens_and_taken_back_for_other_ones():
    """Behind a wrong draft everything is forgotten, what it was penalized for included."""
    params = SamplingParams(temperature=0, presence_penalty=100.0, repeat_last_n=-1)
    right, wrong = sampler(params, rewinds=2), sampler(params, rewinds=2)
    lure = mx.array(np.eye(8, dtype=np.float32)[5] * 50)
    wrong_tokens = sample_rows(mx.stack([mx.array(LOGITS), lure, lure]), [wrong] * 3).read()[0]
    wrong.rewind(2)
    first = right.sample(mx.array(LOGITS)).item()
    assert wrong_tokens[0] == first
    assert wrong_tokens[1] == 5
    assert [wrong.sample(lure).item(), right.sample(lure).item()] == [5, 5]
