from collections import Counter

import numpy as np
import pytest

from models.sampling import Draw, Sampling, TokenCounts, uniform


def counted(counts: TokenCounts) -> dict[int, int]:
    return dict(zip(counts.ids().tolist(), counts.counts().tolist(), strict=True))


# --- sampling


@pytest.mark.parametrize("temperature", [0, 0.0, -1])
def test_no_temperature_is_greedy(temperature: float):
    assert Sampling(temperature=temperature).is_greedy
    assert not Sampling(temperature=1e-30).is_greedy


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_a_repeat_penalty_of_zero_or_one_is_none(off: float):
    assert not Sampling(repeat_penalty=off).has_penalties


@pytest.mark.parametrize("name", ["repeat_penalty", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [-0.5, 0.5])
def test_any_other_penalty_is_one(name: str, value: float):
    sampling = Sampling(**{name: value})
    assert sampling.has_penalties
    assert Draw(sampling, 0.5, 0, TokenCounts([1], 4)).penalizes
    assert not Draw(sampling, 0.5, 0).penalizes


# --- counts


def test_counts_are_of_the_last_tokens_of_the_window():
    assert counted(TokenCounts([1, 2, 3, 2], 3)) == {2: 2, 3: 1}
    assert counted(TokenCounts([1, 2], 10)) == {1: 1, 2: 1}
    assert counted(TokenCounts([], 10)) == {}


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(window: int):
    with pytest.raises(ValueError, match="holds nothing"):
        TokenCounts([1], window)


@pytest.mark.parametrize("window", [1, 2, 7, 1000])
@pytest.mark.parametrize("begun", [0, 3, 300])
def test_counts_follow_every_push_and_pop(window: int, begun: int):
    random = np.random.default_rng(window)
    tokens = random.integers(0, 200, begun).tolist()
    counts = TokenCounts(tokens, window)
    for _ in range(1500):
        if len(tokens) > begun and random.random() < 0.45:
            tokens.pop()
            counts.pop()
        else:
            tokens.append(int(random.integers(0, 200)))
            counts.push(tokens[-1])
        assert counted(counts) == Counter(tokens[-window:])


def test_counts_after_more_tokens_are_told_without_a_change():
    counts = TokenCounts([1, 2, 2], 3)
    ids, often = counts.after([5, 5])
    assert dict(zip(ids.tolist(), often.tolist(), strict=True)) == {2: 1, 5: 2}
    ids, often = counts.after([7, 8, 9, 7])
    assert dict(zip(ids.tolist(), often.tolist(), strict=True)) == {7: 1, 8: 1, 9: 1}
    assert counted(counts) == {1: 1, 2: 2}


def test_what_was_not_pushed_cannot_be_popped():
    counts = TokenCounts([1, 2], 4)
    counts.push(3)
    counts.pop()
    with pytest.raises(AssertionError):
        counts.pop()


# --- uniform


def test_uniform_numbers_are_distinct_and_even_over_positions_and_seeds():
    for numbers in ([uniform(7, position) for position in range(20_000)], [uniform(seed, 0) for seed in range(20_000)]):
        assert len(set(numbers)) == len(numbers)
        assert 0 <= min(numbers) <= max(numbers) < 1
        assert np.mean(numbers) == pytest.approx(0.5, abs=0.01)
        frequencies, _ = np.histogram(numbers, bins=100, range=(0, 1))
        # 99 degrees of freedom: more than 149 once in a thousand times.
        assert ((frequencies - 200) ** 2 / 200).sum() < 149


def test_neighbouring_seeds_and_positions_are_unrelated():
    numbers = np.array([[uniform(seed, position) for position in range(100)] for seed in range(100)])
    for left, right in (
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers[1:, :-1], numbers[:-1, 1:]),
    ):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.05


def test_uniform_is_the_same_for_ever():
    assert uniform(42, 3) == uniform(42, 3)
    assert uniform(0, 0) != uniform(0, 1) != uniform(1, 0)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, 2**70, -(2**70)])
def test_any_number_is_a_seed(seed: int):
    assert 0 <= uniform(seed, 0) < 1
