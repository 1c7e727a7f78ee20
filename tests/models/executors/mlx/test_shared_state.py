"""Layers that look at an earlier layer's state, on MLX: with state in slabs, and on a text by itself."""

from itertools import pairwise

import numpy as np
import pytest

from models.arch import build_model
from models.executors.base import Row, Step
from models.executors.mlx import MLXExecutor, load
from tests.models.executors.checkpoints import SHARED, RandomCheckpoint

TOKENS = tuple(np.random.default_rng(4).integers(0, 320, 400).tolist())
CHECKPOINT = RandomCheckpoint("F32", SHARED)


def executor(cache_type: str = "f16") -> MLXExecutor:
    return load(CHECKPOINT, build_model(SHARED), cache_type=cache_type, longest_step=64)


def read(run_by: MLXExecutor, slot: int, begin: int, end: int) -> np.ndarray:
    found = run_by.forward(Step((Row(slot, begin, TOKENS[begin:end], end - begin),)))
    assert found is not None
    return found.read()


def whole(run_by: MLXExecutor, slot: int) -> np.ndarray:
    return np.concatenate([read(run_by, slot, begin, min(begin + 64, 400)) for begin in range(0, 400, 64)])


def test_a_row_says_the_same_however_it_was_cut():
    made = executor()
    pieces = [read(made, 1, a, b) for a, b in pairwise([0, 1, 2, 33, 97, 160, 200, 255, 256, 257, 320, 380, 400])]
    np.testing.assert_allclose(np.concatenate(pieces), whole(made, 0), rtol=0, atol=2e-4)
    made.close()


@pytest.mark.parametrize(("cache_type", "bound"), [("q8_0", 0.2), ("q4_0", 0.6)])
def test_logits_of_a_quantised_cache_are_near_those_of_the_plain_one(cache_type: str, bound: float):
    exact, rounded = whole(executor(), 0)[:90], whole(executor(cache_type), 0)[:90]
    assert 0 < np.abs(rounded - exact).mean() < bound * exact.std()


def test_a_text_by_itself_is_computed_as_one_with_state():
    made = executor()
    (last,) = made.residuals(TOKENS[:90], [5])
    logits = whole(made, 0)[:90]
    normed = last / np.sqrt((last**2).mean(axis=-1, keepdims=True) + SHARED["rms_norm_eps"])
    normed = normed * CHECKPOINT.value("model.norm.weight", (256,))
    np.testing.assert_allclose(normed @ CHECKPOINT.value("model.embed_tokens.weight", (320, 256)).T, logits, atol=2e-3)
    made.close()
