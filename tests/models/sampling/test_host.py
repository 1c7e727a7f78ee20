import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from models.sampling import INVALID_TOKEN, Draw, Drawn, Sampling, TokenCounts, uniform
from models.sampling.host import sample
from tests.models.sampling.reference import LOGITS, OFF, agrees, distribution, only, penalized, softmax

GREEDY = Sampling(temperature=0)
PENALTIES = {"repeat_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}


def one(logits: np.ndarray, sampling: Sampling, number: float = 0.5, **more) -> Drawn:
    return sample(np.asarray(logits, dtype=np.float32)[None], [Draw(sampling, number, 0, **more)])[0]


def token_of(logits: np.ndarray, sampling: Sampling, number: float = 0.5, **more) -> int:
    return one(logits, sampling, number, **more).token


def drawn(sampling: Sampling, count: int = 1000, logits: np.ndarray = LOGITS, seed: int = 1) -> list[int]:
    """The tokens of so many positions with the same logits."""
    draws = [Draw(sampling, uniform(seed, position), 0) for position in range(count)]
    return [each.token for each in sample(np.broadcast_to(logits, (count, logits.size)), draws)]


def check_frequencies(tokens: list[int], expected: np.ndarray) -> None:
    """A chi-square test at about one in ten thousand, by Wilson and Hilferty's approximation."""
    counts = np.bincount(tokens, minlength=expected.size)
    assert not counts[expected == 0].any(), "something ruled out was drawn"
    usual = expected * len(tokens) >= 5
    observed = np.append(counts[usual], counts[~usual].sum())
    awaited = np.append(expected[usual], expected[~usual].sum()) * len(tokens)
    observed, awaited = observed[awaited > 0], awaited[awaited > 0]
    freedom = len(awaited) - 1
    if freedom:
        limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
        assert ((observed - awaited) ** 2 / awaited).sum() < limit


def normal(size: int, spread: float = 2.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


# --- against the reference

GRID = [
    Sampling(temperature, top_k, top_p, min_p, typical_p)
    for temperature, top_k, top_p, min_p, typical_p in itertools.product(
        (0.3, 1.0, 1.5), (0, 1, 40, 900, 6000), (0.0, 0.5, 0.95), (0.0, 0.02), (1.0, 0.6)
    )
]


@pytest.mark.parametrize("size", [60, 12_345])
@pytest.mark.parametrize("penalties", [{}, PENALTIES], ids=["plain", "penalties"])
def test_every_combination_agrees_with_the_reference(size: int, penalties: dict[str, float]):
    random = np.random.default_rng(size)
    for index, plain in enumerate(GRID):
        sampling = replace(plain, **penalties)
        logits = normal(size, (1.0, 2.0, 4.0)[index % 3], seed=index)
        history = random.integers(0, size, 30).tolist()
        counts = TokenCounts(history, 64) if penalties else None
        numbers = [0.0, 1 - 2**-53, *random.random(2)]
        draws = [Draw(sampling, number, 0, counts) for number in numbers]
        expected = distribution(logits, sampling, history)
        # Rounding may move the last candidate in or out.
        rounding = 1e-5 + (1e-4 if size > 1000 else 0)
        for number, each in zip(numbers, sample(np.stack([logits] * 4), draws), strict=True):
            assert agrees(each.token, expected, number, rounding), (sampling, number)


@pytest.mark.parametrize("size", [49_152, 50_000])
@pytest.mark.parametrize("shape", ["flat", "peaked", "zipf", "alike", "coarse", "few possible"])
def test_a_large_vocabulary_agrees_with_the_reference(size: int, shape: str):
    logits = normal(size, 1.5)
    if shape == "peaked":
        logits[np.random.default_rng(1).integers(0, size, 12)] += 12
    elif shape == "zipf":
        logits = (-1.1 * np.log1p(np.random.default_rng(1).permutation(size))).astype(np.float32)
    elif shape == "alike":
        logits = np.zeros(size, dtype=np.float32)
    elif shape == "coarse":
        logits = np.round(logits * 2) / 2
    elif shape == "few possible":
        logits[np.random.default_rng(1).random(size) < 0.999] = -np.inf
    samplings = [
        OFF,
        replace(OFF, top_p=0.95, temperature=1.5),
        replace(OFF, top_p=0.3, min_p=1e-4),
        replace(OFF, typical_p=0.7, temperature=1.5),
        replace(OFF, typical_p=0.9, top_p=0.9),
        replace(OFF, top_k=20_000, top_p=0.9),
        Sampling(),
    ]
    for index, sampling in enumerate(samplings):
        expected = distribution(logits, sampling)
        for number in (0.0, uniform(index, 0), 1 - 2**-53):
            assert agrees(token_of(logits, sampling, number), expected, number, 2e-4), (sampling, number)


# --- drawing


def test_temperature_zero_takes_the_greatest():
    draws = [Draw(GREEDY, 0.5, 0), Draw(GREEDY, 0.5, 1)]
    assert sample(np.stack([LOGITS, LOGITS[::-1]]), draws) == [Drawn(0), Drawn(7)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_shapes_the_distribution(temperature: float):
    check_frequencies(drawn(replace(OFF, temperature=temperature), 3000), softmax(LOGITS / temperature))


@pytest.mark.parametrize("top_k", [1, 3, 8, 1000])
def test_top_k_leaves_the_k_greatest(top_k: int):
    expected = only(range(min(top_k, 8)), softmax(LOGITS / 2))
    check_frequencies(drawn(replace(OFF, top_k=top_k, temperature=2.0)), expected)


@pytest.mark.parametrize("top_k", [0, 6])
def test_top_p_leaves_the_fewest_that_reach_the_mass(top_k: int):
    # 0.45, 0.27, 0.17, 0.10: the third is still needed for 0.8.
    check_frequencies(drawn(replace(OFF, top_k=top_k, top_p=0.8)), only([0, 1, 2], softmax(LOGITS)))


def test_temperature_comes_before_top_p():
    assert set(drawn(replace(OFF, top_p=0.5, temperature=5.0))) == {0, 1, 2}
    assert set(drawn(replace(OFF, top_p=0.5, temperature=0.2))) == {0}


@pytest.mark.parametrize("logits", [LOGITS, normal(20_000, 0.1)], ids=["few", "many"])
@pytest.mark.parametrize("top_p", [1e-9, 1e-300])
def test_a_tiny_top_p_leaves_the_greatest(logits: np.ndarray, top_p: float):
    assert set(drawn(replace(OFF, top_p=top_p), 20, logits)) == {int(logits.argmax())}


def test_min_p_is_a_share_of_the_most_probable():
    # exp(-1.5) = 0.22, exp(-2) = 0.14.
    check_frequencies(drawn(replace(OFF, min_p=0.2)), only([0, 1, 2, 3], softmax(LOGITS)))


@pytest.mark.parametrize("min_p", [1.0, 5.0])
def test_a_min_p_of_all_leaves_the_greatest(min_p: float):
    assert set(drawn(replace(OFF, min_p=min_p), 50)) == {0}
    assert set(drawn(replace(OFF, min_p=min_p), 50, np.array([1, 3, 3, 0], dtype=np.float32))) == {1, 2}


def test_typical_p_prefers_tokens_of_expected_surprise():
    sampling = replace(OFF, typical_p=0.4)
    expected = distribution(LOGITS, sampling)
    assert expected[0] == 0, "the most probable token is not a typical one here"
    check_frequencies(drawn(sampling), expected)


def test_a_tiny_typical_p_leaves_the_most_typical():
    most_typical = int(distribution(LOGITS, replace(OFF, typical_p=1e-300)).argmax())
    assert set(drawn(replace(OFF, typical_p=1e-300), 50)) == {most_typical}


def test_top_p_is_a_share_of_what_typical_p_left():
    # Tokens 1 and 2 are the typical ones; of the two, 1 alone has more than half.
    assert set(drawn(replace(OFF, typical_p=0.4))) == {1, 2}
    assert set(drawn(replace(OFF, typical_p=0.4, top_p=0.5))) == {1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-7])
def test_a_tiny_temperature_is_as_good_as_none(temperature: float):
    assert set(drawn(Sampling(temperature=temperature), 50)) == {0}
    assert set(drawn(replace(OFF, temperature=temperature), 50)) == {0}


@pytest.mark.parametrize("temperature", [1e9, 1e300])
def test_a_huge_temperature_draws_evenly_from_what_is_possible(temperature: float):
    logits = np.append(LOGITS, -np.inf).astype(np.float32)
    check_frequencies(drawn(replace(OFF, temperature=temperature), 2000, logits), np.append(np.full(8, 1 / 8), 0))


def test_equal_scores_at_the_limit_are_kept_in_the_order_of_their_ids():
    logits = np.array([1, 2, 1, 1, 2, 1], dtype=np.float32)
    assert set(drawn(replace(OFF, top_k=3), 100, logits)) == {0, 1, 4}
    assert set(drawn(replace(OFF, top_k=1), 100, logits)) == {1}
    # 2: 0.29 each; 1: 0.11 each.
    assert set(drawn(replace(OFF, top_p=0.7), 100, logits)) == {0, 1, 2, 4}
    alike = np.zeros(10_000, dtype=np.float32)
    assert set(drawn(replace(OFF, top_k=5), 100, alike)) == set(range(5))
    assert max(drawn(replace(OFF, top_k=7000), 200, alike)) < 7000
    assert max(drawn(replace(OFF, top_p=0.7), 200, alike)) <= 7000


@pytest.mark.parametrize("sampling", [Sampling(), OFF, replace(OFF, typical_p=0.5, min_p=0.1), replace(OFF, top_k=5)])
@pytest.mark.parametrize("size", [8, 9000])
def test_logits_of_minus_infinity_are_never_drawn(sampling: Sampling, size: int):
    logits = np.full(size, -np.inf, dtype=np.float32)
    logits[[3, 5]] = 1.0, -0.5
    assert set(drawn(sampling, 40, logits)) <= {3, 5}


def test_the_lowest_floats_are_as_good_as_minus_infinity():
    logits = np.array([0.0, np.finfo(np.float32).min, 3e38, 3e38], dtype=np.float32)
    assert set(drawn(Sampling(temperature=0.1), 40, logits)) == {2, 3}


def test_the_same_seed_draws_the_same_and_another_seed_something_else():
    assert drawn(OFF, 50, seed=3) == drawn(OFF, 50, seed=3)
    assert drawn(OFF, 50, seed=3) != drawn(OFF, 50, seed=4)


@pytest.mark.parametrize("size", [500, 20_011])
def test_a_row_says_the_same_in_any_company(size: int):
    logits = np.stack([normal(size, 1.0 + index / 4, seed=index) for index in range(16)])
    samplings = [OFF, Sampling(), GREEDY, *GRID[::17]]
    draws = []
    for index in range(16):
        sampling = replace(samplings[index % len(samplings)], **(PENALTIES if index % 3 == 0 else {}))
        counts = TokenCounts([1, 2, 2, index], 8)
        draws.append(Draw(sampling, uniform(index, 5), index, counts, top_logprobs=3 if index % 2 else None))
    together = sample(logits, draws)
    assert [sample(logits[index : index + 1].copy(), [draw])[0] for index, draw in enumerate(draws)] == together
    assert sample(logits[::-1], draws[::-1]) == together[::-1]


def test_the_logits_are_only_read():
    logits = normal(9000)[None]
    before = logits.copy()
    logits.flags.writeable = False
    sampling = Sampling(top_k=0, typical_p=0.9, min_p=0.01, **PENALTIES)
    sample(logits, [Draw(sampling, 0.5, 0, TokenCounts([1, 2], 4), top_logprobs=5)])
    assert np.array_equal(logits, before)


def test_what_nobody_has_read_is_not_sampled_on_the_host():
    with pytest.raises(AssertionError):
        one(LOGITS, Sampling(), unread=True)


# --- penalties


def greedy_with(history: list[int], logits: np.ndarray = LOGITS, window: int = 64, drafted=(), **penalties) -> int:
    sampling = Sampling(temperature=0, **penalties)
    return token_of(logits, sampling, counts=TokenCounts(history, window), drafted=drafted)


def test_repeat_penalty_divides_what_is_positive_and_multiplies_what_is_negative():
    assert greedy_with([0, 0, 0], repeat_penalty=1.2) == 0, "2 / 1.2 is still the greatest: repeats count once"
    assert greedy_with([0, 0, 0], repeat_penalty=1.5) == 1
    assert greedy_with([0], np.array([-1.0, -1.5]), repeat_penalty=2.0) == 1


def test_a_repeat_penalty_below_one_favours_what_was_there():
    assert greedy_with([1], repeat_penalty=0.5) == 1
    assert greedy_with([1], np.array([-1.0, -1.5]), repeat_penalty=0.5) == 1


def test_presence_penalty_counts_once_and_frequency_penalty_each_time():
    assert greedy_with([0, 0, 0], presence_penalty=0.4) == 0
    assert greedy_with([0, 0, 0], presence_penalty=0.6) == 1
    assert greedy_with([0], frequency_penalty=0.2) == 0
    assert greedy_with([0, 0, 0], frequency_penalty=0.2) == 1


def test_penalties_look_back_no_farther_than_the_window():
    assert greedy_with([0, 5, 5], presence_penalty=9, window=2) == 0
    assert greedy_with([0, 5, 5], presence_penalty=9, window=3) == 1


def test_drafted_tokens_are_penalized_and_move_the_window():
    assert greedy_with([5], presence_penalty=9, drafted=(0, 1)) == 2
    assert greedy_with([0, 5], presence_penalty=9, window=2, drafted=(6,)) == 0
    assert greedy_with([0, 5], presence_penalty=9, window=3, drafted=(6,)) == 1
    assert greedy_with([0], frequency_penalty=0.3, drafted=(0,)) == 1


def test_a_row_without_counts_has_no_penalties():
    assert token_of(LOGITS, Sampling(temperature=0, presence_penalty=100.0)) == 0


def test_penalties_change_the_distribution_drawn_from():
    sampling = replace(OFF, **PENALTIES)
    draws = [Draw(sampling, uniform(2, position), 0, TokenCounts([0, 0, 5], 8)) for position in range(3000)]
    tokens = [each.token for each in sample(np.stack([LOGITS] * 3000), draws)]
    check_frequencies(tokens, softmax(penalized(LOGITS, sampling, [0, 0, 5])))


def test_penalties_that_leave_no_number_leave_no_token():
    counts = TokenCounts([0], 4)
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, repeat_penalty=1e-44)
        assert token_of(LOGITS, sampling, counts=counts) == INVALID_TOKEN


# --- what is not a number


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1), replace(GREEDY, presence_penalty=1.0)], ids=str)
def test_a_row_without_finite_logits_is_marked_and_the_others_are_not(sampling: Sampling):
    bad = [np.where(np.arange(8) == 5, value, LOGITS) for value in (np.nan, np.inf)]
    logits = np.stack([LOGITS, *bad, np.full(8, -np.inf), LOGITS]).astype(np.float32)
    draws = [Draw(sampling, 0.5, slot, TokenCounts([7], 4), top_logprobs=None) for slot in range(5)]
    assert [each.token for each in sample(logits, draws)] == [0, INVALID_TOKEN, INVALID_TOKEN, INVALID_TOKEN, 0]
    told = sample(logits, [replace(draw, top_logprobs=2) for draw in draws])
    assert told[1:4] == [Drawn(INVALID_TOKEN)] * 3
    assert told[0].logprob is not None


# --- log-probabilities


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.1, top_k=2, presence_penalty=5.0)], ids=str)
def test_logprobs_are_those_of_the_unmodified_distribution(sampling: Sampling):
    told = one(LOGITS, sampling, counts=TokenCounts([0], 4), top_logprobs=4)
    expected = np.log(softmax(LOGITS.astype(np.float64)))
    assert told.logprob == pytest.approx(expected[told.token], abs=1e-6)
    assert [token for token, _ in told.top] == [0, 1, 2, 3]
    assert [value for _, value in told.top] == pytest.approx(expected[:4], abs=1e-6)


def test_logprobs_are_told_as_far_as_they_were_asked_for():
    assert one(LOGITS, GREEDY) == Drawn(0)
    told = one(LOGITS, GREEDY, top_logprobs=0)
    assert told.logprob == pytest.approx(math.log(softmax(LOGITS)[0]), abs=1e-6)
    assert told.top == ()


def test_more_alternatives_than_tokens_are_all_tokens():
    assert [token for token, _ in one(LOGITS[:3], GREEDY, top_logprobs=20).top] == [0, 1, 2]


def test_an_impossible_token_is_no_alternative():
    logits = np.array([-np.inf, 1.0, -np.inf, 2.0])
    assert [token for token, _ in one(logits, GREEDY, top_logprobs=3).top] == [3, 1]


@pytest.mark.parametrize("size", [50, 8192, 10_001])
@pytest.mark.parametrize("count", [1, 20])
def test_alternatives_are_the_greatest_in_falling_order(size: int, count: int):
    logits = np.round(normal(size), 2)
    top = one(logits, GREEDY, top_logprobs=count).top
    assert [token for token, _ in top] == np.argsort(-logits, kind="stable")[:count].tolist()


def test_the_greatest_may_all_lie_side_by_side():
    logits = np.zeros(10_000, dtype=np.float32)
    logits[640:680] = np.arange(1, 41)
    assert [token for token, _ in one(logits, GREEDY, top_logprobs=40).top] == list(range(679, 639, -1))
    assert Counter(drawn(replace(OFF, top_k=40, temperature=1e9), 400, logits)).keys() == set(range(640, 680))
