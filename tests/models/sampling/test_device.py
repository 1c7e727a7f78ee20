from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from models.sampling import INVALID_TOKEN, Draw, Drawn, Sampling, TokenCounts, device, host, uniform
from tests.models.sampling.reference import LOGITS, OFF, agrees, distribution

GREEDY = Sampling(temperature=0)
PENALTIES = {"repeat_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}
VARIED = [
    OFF,
    GREEDY,
    Sampling(),
    Sampling(temperature=1.5, top_k=0, top_p=0.95),
    Sampling(temperature=1.2, top_k=0, top_p=0.9, typical_p=0.8),
    replace(OFF, typical_p=0.5),
    replace(OFF, min_p=0.05),
    replace(OFF, top_k=5),
    replace(OFF, top_k=3000, top_p=0.7, min_p=0.01),
    replace(OFF, top_k=10**6, temperature=0.7),
    Sampling(top_k=33, typical_p=0.9),
    replace(GREEDY, **PENALTIES),
    replace(OFF, **PENALTIES),
    Sampling(**PENALTIES),
    Sampling(top_k=0, frequency_penalty=0.5),
    Sampling(top_k=64, presence_penalty=-1.0, repeat_penalty=0.9),
]


def sampled(logits: np.ndarray, draws: list[Draw], last: dict[int, mx.array] | None = None) -> list[Drawn]:
    tokens, waiting = device.sample(mx.array(np.ascontiguousarray(logits, dtype=np.float32)), draws, last)
    assert tokens.shape == (len(draws),)
    assert tokens.dtype == mx.int32
    mx.eval(waiting.arrays())
    told = waiting.read()
    assert [each.token for each in told] == tokens.tolist()
    return told


def one(logits: np.ndarray, sampling: Sampling, number: float = 0.5, last: int | None = None, **more) -> Drawn:
    known = None if last is None else {0: mx.array([last], dtype=mx.int32)}
    return sampled(np.asarray(logits)[None], [Draw(sampling, number, 0, **more)], known)[0]


def drawn(sampling: Sampling, count: int = 500, logits: np.ndarray = LOGITS) -> list[int]:
    draws = [Draw(sampling, uniform(1, position), 0) for position in range(count)]
    return [each.token for each in sampled(np.broadcast_to(logits, (count, logits.size)), draws)]


def varied_rows(size: int, seed: int) -> tuple[np.ndarray, list[Draw]]:
    """A row of each of `VARIED`."""
    random = np.random.default_rng(seed)
    logits = (random.normal(size=(len(VARIED), size)) * random.uniform(1, 4, (len(VARIED), 1))).astype(np.float32)
    logits[random.random(logits.shape) < 0.05] = -np.inf
    draws = [
        Draw(
            sampling,
            uniform(seed, row),
            row,
            TokenCounts(random.integers(0, size, 20).tolist(), 16),
            drafted=(1, 2, 1)[: row % 4],
            top_logprobs=(None, 0, 5, 20)[row % 4],
        )
        for row, sampling in enumerate(VARIED)
    ]
    return logits, draws


# --- as on the host


@pytest.mark.parametrize("size", [20, 700, 10_007])
def test_the_device_says_what_the_host_says(size: int):
    for seed in range(25 if size < 1000 else 6):
        logits, draws = varied_rows(size, seed)
        for here, there in zip(sampled(logits, draws), host.sample(logits, draws), strict=True):
            assert here.token == there.token
            assert (here.logprob is None) == (there.logprob is None)
            if there.logprob is not None:
                assert here.logprob == pytest.approx(there.logprob, abs=1e-4)
            assert [token for token, _ in here.top] == [token for token, _ in there.top]
            assert [value for _, value in here.top] == pytest.approx([value for _, value in there.top], abs=1e-4)


@pytest.mark.parametrize("sampling", VARIED, ids=range(len(VARIED)))
def test_the_device_draws_from_the_distribution_of_the_reference(sampling: Sampling):
    random = np.random.default_rng(5)
    logits = (random.normal(size=3000) * 2).astype(np.float32)
    history = [1, 2, 2, int(logits.argmax())]
    expected = distribution(logits, sampling, history)
    numbers = [0.0, 1 - 2**-53, *random.random(14)]
    draws = [Draw(sampling, number, 0, TokenCounts(history, 8)) for number in numbers]
    for number, each in zip(numbers, sampled(np.stack([logits] * 16), draws), strict=True):
        assert agrees(each.token, expected, number, 2e-5)


def test_a_row_says_the_same_in_any_company():
    logits, draws = varied_rows(5000, seed=9)
    together = sampled(logits, draws)
    assert [sampled(logits[row : row + 1], [draw])[0] for row, draw in enumerate(draws)] == together
    assert sampled(logits[::-1], draws[::-1]) == together[::-1]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_logits_may_be_narrow_and_are_computed_with_as_float32(dtype: mx.Dtype):
    narrow = mx.array(np.random.default_rng(0).normal(size=(1, 900)).astype(np.float32)).astype(dtype)
    draws = [Draw(Sampling(top_k=0), 0.3, 0, top_logprobs=3)]
    wide = np.array(narrow.astype(mx.float32))
    here, there = device.sample(narrow, draws)[1].read()[0], host.sample(wide, draws)[0]
    assert here.token == there.token
    assert here.logprob == pytest.approx(there.logprob, abs=1e-5)


# --- limits


@pytest.mark.parametrize("top_k", [1, 3, 5, 1000])
def test_top_k_leaves_the_k_greatest(top_k: int):
    assert set(drawn(replace(OFF, top_k=top_k, temperature=9.0))) == set(range(min(top_k, 8)))


@pytest.mark.parametrize(
    "limits",
    [{"top_p": 1e-9}, {"top_p": 1e-300}, {"min_p": 1.0}, {"min_p": 5.0}, {"temperature": 1e-30}, {"top_k": 1}],
    ids=str,
)
def test_limits_at_their_ends_leave_the_greatest(limits: dict[str, float]):
    sampling = replace(OFF, **limits)
    assert set(drawn(sampling, 50, LOGITS[::-1])) == {7}
    assert set(drawn(sampling, 50, np.roll(LOGITS, 3))) == {3}


def test_equally_probable_tokens_all_reach_any_min_p():
    logits = np.array([1, 3, 3, 0], dtype=np.float32)
    assert set(drawn(replace(OFF, min_p=1.0), 50, logits)) == {1, 2}


def test_a_tiny_typical_p_leaves_the_most_typical():
    most_typical = int(distribution(LOGITS, replace(OFF, typical_p=1e-300)).argmax())
    assert set(drawn(replace(OFF, typical_p=1e-300), 50)) == {most_typical}
    assert set(drawn(replace(OFF, typical_p=1e-300, top_p=1e-300, top_k=8), 50)) == {most_typical}


def test_a_huge_temperature_draws_evenly_from_what_is_possible():
    logits = np.append(LOGITS, -np.inf).astype(np.float32)
    counts = Counter(drawn(replace(OFF, temperature=1e300), 800, logits))
    assert set(counts) == set(range(8))
    assert min(counts.values()) > 60


@pytest.mark.parametrize("size", [6, 10_000])
def test_equal_scores_at_the_limit_are_kept_in_the_order_of_their_ids(size: int):
    logits = np.zeros(size, dtype=np.float32)
    assert set(drawn(replace(OFF, top_k=3), 60, logits)) == {0, 1, 2}
    logits[[4, 1]] = 30.0
    assert set(drawn(replace(OFF, top_k=3, temperature=1e9), 60, logits)) == {0, 1, 4}
    assert set(drawn(replace(OFF, top_p=2.5 / size, temperature=1e9), 60, logits)) == {0, 1, 4}


@pytest.mark.parametrize("sampling", [Sampling(), OFF, replace(OFF, typical_p=0.5, min_p=0.1), replace(OFF, top_k=5)])
def test_logits_of_minus_infinity_are_never_drawn(sampling: Sampling):
    logits = np.full(1000, -np.inf, dtype=np.float32)
    logits[[3, 500]] = 1.0, -0.5
    assert set(drawn(sampling, 40, logits)) <= {3, 500}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1), replace(GREEDY, presence_penalty=1.0)], ids=str)
def test_a_row_without_finite_logits_is_marked_and_the_others_are_not(sampling: Sampling):
    bad = [np.where(np.arange(8) == 5, value, LOGITS) for value in (np.nan, np.inf)]
    logits = np.stack([LOGITS, *bad, np.full(8, -np.inf), LOGITS])
    draws = [Draw(sampling, 0.5, slot, TokenCounts([7], 4), top_logprobs=2) for slot in range(5)]
    told = sampled(logits, draws)
    assert [each.token for each in told] == [0, INVALID_TOKEN, INVALID_TOKEN, INVALID_TOKEN, 0]
    assert told[1:4] == [Drawn(INVALID_TOKEN)] * 3


# --- penalties


def test_what_was_drawn_is_penalized_before_the_host_has_read_it():
    sampling = replace(GREEDY, presence_penalty=100.0)
    counts = TokenCounts([7, 7, 7], 3)
    # Each token is out of bounds for three draws, then the greatest comes round again.
    token, tokens = None, []
    for _ in range(8):
        draw = Draw(sampling, 0.5, 4, counts, unread=token is not None)
        before = token
        token, _ = device.sample(mx.array(LOGITS[None]), [draw], {} if before is None else {4: before})
        if before is not None:
            tokens.append(before.item())
            counts.push(tokens[-1])
    assert tokens == [0, 1, 2, 3, 0, 1, 2]


def test_an_unread_token_counts_with_those_that_are_known():
    sampling = replace(GREEDY, frequency_penalty=0.3)
    assert one(LOGITS, sampling, counts=TokenCounts([0], 8)).token == 0
    assert one(LOGITS, sampling, last=0, counts=TokenCounts([0], 8), unread=True).token == 1
    assert one(LOGITS, sampling, last=0, counts=TokenCounts([3], 8), unread=True).token == 0
    assert one(LOGITS, sampling, last=0, counts=TokenCounts([3], 8), unread=True, drafted=(0,)).token == 1


def test_an_unread_token_takes_the_place_of_the_oldest():
    sampling = replace(GREEDY, presence_penalty=9.0)
    assert one(LOGITS, sampling, last=6, counts=TokenCounts([0, 1], 2), unread=True).token == 0
    assert one(LOGITS, sampling, last=6, counts=TokenCounts([0, 1], 3), unread=True).token == 2
    assert one(LOGITS, sampling, last=0, counts=TokenCounts([1], 1), unread=True, drafted=(5,)).token == 0


def test_an_unread_token_may_be_a_scalar_of_another_slot():
    draws = [Draw(replace(GREEDY, presence_penalty=9.0), 0.5, slot, TokenCounts([], 4), unread=True) for slot in (3, 8)]
    last = {3: mx.array(0, dtype=mx.int32), 8: mx.array([1], dtype=mx.int32)}
    assert [each.token for each in sampled(np.stack([LOGITS] * 2), draws, last)] == [1, 0]


def test_a_row_without_tokens_before_it_is_not_penalized():
    draw = Draw(replace(GREEDY, presence_penalty=9.0), 0.5, 0, TokenCounts([], 4))
    assert sampled(LOGITS[None], [draw]) == [Drawn(0)]
    assert host.sample(LOGITS[None], [draw]) == [Drawn(0)]


def test_penalties_that_leave_no_number_leave_no_token():
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, repeat_penalty=1e-38)
        assert one(LOGITS * 100, sampling, counts=TokenCounts([0], 4)).token == INVALID_TOKEN


# --- log-probabilities


def test_logprobs_are_told_as_far_as_they_were_asked_for():
    draws = [Draw(GREEDY, 0.5, slot, top_logprobs=asked) for slot, asked in enumerate((None, 0, 2, 20))]
    told = sampled(np.stack([LOGITS] * 4), draws)
    assert told[0] == Drawn(0)
    assert [len(each.top) for each in told] == [0, 0, 2, 8]
    assert told[1].logprob == told[2].logprob == told[2].top[0][1]
    assert [token for token, _ in told[3].top] == list(range(8))


def test_an_impossible_token_is_no_alternative():
    told = one(np.array([-np.inf, 1.0, -np.inf, 2.0]), GREEDY, top_logprobs=3)
    assert [token for token, _ in told.top] == [3, 1]
