"""Layers that look at an earlier layer's state, on a CPU: in place, and in whatever the state is held."""

from itertools import pairwise

import numpy as np
import pytest

from models.arch import build_model
from models.executors.base import Row, Step
from models.executors.onnx import OnnxExecutor, OnnxOptions, filling, load
from tests.models.executors.checkpoints import SHARED, RandomCheckpoint

TOKENS = tuple(np.random.default_rng(4).integers(0, 320, 400).tolist())


def executor(cache_type: str = "f16", kind: str = "F32") -> OnnxExecutor:
    checkpoint = RandomCheckpoint(kind, SHARED)
    model = build_model(checkpoint.config)
    options = OnnxOptions(slots=3, capacity=512, threads=2, cache_type=cache_type)
    return OnnxExecutor(load(checkpoint, model, options), model.config.vocab_size)


def read(run_by: OnnxExecutor, slot: int, begin: int, end: int, *others: Row) -> np.ndarray:
    """The logits of a row's tokens [begin, end)."""
    found = run_by.forward(Step((Row(slot, begin, TOKENS[begin:end], end - begin), *others)))
    assert found is not None
    return found.read()[: end - begin].copy()


def test_only_layers_with_keys_of_their_own_take_memory_and_one_that_others_look_at_holds_everything():
    made = executor()
    arrays = dict(made.segment(0, 0, 0, 0).arrays())
    assert {name.partition(".")[2] for name in arrays} == {"0", "1", "2"}
    read(made, 0, 0, 400)
    lengths = {name: array.shape[1] for name, array in made.segment(0, 400, 399, 400).arrays()}
    assert set(lengths.values()) == {1}
    assert made.first_held(400) > 0, "the first layer's window has moved"
    made.close()


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
def test_a_row_says_the_same_however_it_was_cut(cache_type: str):
    made = executor(cache_type)
    whole = read(made, 0, 0, 400)
    pieces = [read(made, 1, a, b) for a, b in pairwise([0, 1, 2, 33, 97, 290, 291, 292, 400])]
    apart = np.abs(np.concatenate(pieces) - whole)
    # A value between two codes may become either; seldom, and the codes are near each other.
    assert apart.max() < (2e-4 if cache_type == "f16" else 5e-2)
    assert apart.mean() < 5e-5
    made.close()


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_layers_that_share_may_lie_in_different_parts_of_the_graph(cache_type: str, monkeypatch: pytest.MonkeyPatch):
    whole = executor(cache_type)
    monkeypatch.setattr(filling, "PART_BYTES", 1)
    monkeypatch.setattr(filling, "PARTS", 1_000_000)
    parted = executor(cache_type)
    for a, b in pairwise([0, 70, 71, 72, 300, 301]):
        np.testing.assert_array_equal(read(parted, 1, a, b), read(whole, 1, a, b))


@pytest.mark.parametrize(("cache_type", "bound"), [("q8_0", 0.1), ("q4_0", 0.6)])
def test_logits_of_a_quantised_cache_are_near_those_of_the_plain_one(cache_type: str, bound: float):
    plain, rounded = executor(), executor(cache_type)
    exact = read(plain, 0, 0, 90)
    moved = np.abs(read(rounded, 0, 0, 90) - exact).mean()
    assert 0 < moved < bound * exact.std()


def test_a_row_past_its_window_says_the_same_beside_others():
    made = executor(kind="Q4_1")
    read(made, 0, 0, 300)
    alone = [read(made, 0, place, place + 1) for place in range(300, 330)]
    read(made, 1, 0, 300)
    beside = [read(made, 1, place, place + 1, Row(2, place - 300, (7,), 1)) for place in range(300, 330)]
    np.testing.assert_array_equal(np.concatenate(beside), np.concatenate(alone))
    made.close()
