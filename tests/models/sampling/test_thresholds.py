import numpy as np
import pytest

from models.sampling.thresholds import greatest, reaching

SIZES = [1, 5, 4096, 4097, 20_011, 49_152]


def keys_of(shape: str, size: int) -> np.ndarray:
    random = np.random.default_rng(size)
    keys = random.normal(size=size).astype(np.float32)
    if shape == "coarse":
        return np.round(keys)
    if shape == "alike":
        return np.zeros_like(keys)
    if shape == "rising":
        return np.sort(keys)
    if shape == "high where none looks":
        keys[1::16] += 20
        keys[7::64] -= 20
    if shape == "impossible":
        keys[random.random(size) < 0.9] = -np.inf
    return keys


SHAPES = ["normal", "coarse", "alike", "rising", "high where none looks", "impossible"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_greatest_are_those_of_a_stable_sort(shape: str, size: int):
    scores = keys_of(shape, size)
    order = np.argsort(-scores, kind="stable")
    for count in {1, 2, 40, 383, 385, 5000, size // 2, size - 1, size, size + 1} - {0}:
        assert np.array_equal(greatest(scores, count), np.sort(order[:count])), count


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mass_of_the_keys_themselves_is_reached_with_the_fewest(shape: str, size: int):
    weights = np.exp(keys_of(shape, size) * 2)
    total = weights.sum(dtype=np.float64)
    for share in (0.0, 1e-9, 0.01, 0.3, 0.7, 0.95, 0.999, 1.0, 1.0000001, 2.0):
        kept = reaching(weights, weights, float(weights.sum()), share * total)
        check(kept, weights, weights, share * total)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0, 100.0])
def test_a_mass_of_other_weights_is_reached_with_the_fewest(shape: str, size: int, spread: float):
    keys = np.maximum(keys_of(shape, size), -50)
    heights = np.random.default_rng(1).normal(size=size) * spread
    weights = np.exp(heights - heights.max()).astype(np.float32)
    if shape in ("coarse", "alike", "impossible"):
        # Which of equal keys are kept goes by id, and their weights are alike where keys are of the same score.
        weights = np.exp(keys)
    total = weights.sum(dtype=np.float64)
    for share in (0.0, 1e-9, 0.3, 0.9, 0.999, 1.0, 1.0000001, 2.0):
        kept = reaching(keys, weights, float(weights.sum()), share * total)
        check(kept, keys, weights, share * total)


def check(kept: np.ndarray, keys: np.ndarray, weights: np.ndarray, mass: float) -> None:
    """Those kept are the first of a stable sort, and but for rounding as many as it takes."""
    order = np.argsort(-keys, kind="stable")
    count = np.count_nonzero(kept)
    assert count >= 1
    assert kept[order[:count]].all()
    rounding = 1e-5 * weights.sum(dtype=np.float64)
    sums = np.cumsum(weights[order], dtype=np.float64)
    assert count == keys.size or sums[count - 1] >= mass - rounding
    assert count == 1 or sums[count - 2] <= mass + rounding
