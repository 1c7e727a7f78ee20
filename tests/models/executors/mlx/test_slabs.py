"""What slabs owe their rows: nothing copied that need not be, nothing left over from another row."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from models.arch import build_model
from models.executors.base import Row, Step
from models.executors.mlx import MLXExecutor, load
from models.sampling import Draw, Sampling
from tests.models.executors.checkpoints import CONFIG, RandomCheckpoint

TOKENS = np.random.default_rng(1).integers(0, 300, 2000).tolist()
POISON = 319
"""A token whose embedding is no number, where a test wants one."""


class PoisonedCheckpoint(RandomCheckpoint):
    """One whose embedding of POISON is no number; its head is another matrix."""

    def value(self, name: str, shape: tuple[int, ...]) -> Any:
        values = RandomCheckpoint.value(self, name, shape)
        if "embed_tokens" in name:
            values[POISON] = np.nan
        return values


def made(changes: dict[str, Any] | None = None, kind: type = RandomCheckpoint, **options: Any) -> MLXExecutor:
    checkpoint = kind("F32", CONFIG | (changes or {}))
    return load(checkpoint, build_model(checkpoint.config), **({"longest_step": 64} | options))


def filled(rows: int, **options: Any) -> MLXExecutor:
    """An executor with so many rows of 60 tokens."""
    model = made({"num_hidden_layers": 6}, **options)
    for slot in range(rows):
        model.forward(Step((Row(slot, 0, tuple(TOKENS[slot : slot + 60]), 0),)))
    mx.eval(model._slabs.arrays())
    return model


def read(model: MLXExecutor, *rows: Row) -> np.ndarray:
    logits = model.forward(Step(rows))
    assert logits is not None
    return logits.read()


def peak(run: Callable[[], object]) -> int:
    """The bytes that a call takes at its peak."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("depth", [0, 1])
def test_rows_of_one_class_that_draft_differently_copy_no_slab(depth: int):
    model = filled(32, depth=depth)
    one_array = model._slabs.arrays()[0].nbytes

    def step(n: int) -> None:
        rows = tuple(Row(slot, 60 + n, tuple(TOKENS[: 1 if slot < 16 else 2])) for slot in range(32))
        logits = model.forward(Step(rows))
        assert logits is not None
        model.sample(logits, [Draw(Sampling(temperature=0), 0.0, slot) for slot in range(32)]).read()

    step(0)
    assert peak(lambda: [step(n) for n in range(1, 6)]) < 0.75 * one_array


def test_a_row_that_leaves_moves_one_row_and_not_the_slab():
    model = filled(16)
    assert peak(lambda: model.release(2)) <= 1.1 * model.state_nbytes(60)


def test_a_slab_that_grows_is_held_twice_a_layer_at_a_time():
    model = filled(8)
    before = model._slabs.nbytes
    taken = peak(lambda: model.forward(Step((Row(8, 0, (1, 2, 3), 0),))))
    assert model._slabs.nbytes == 2 * before
    assert taken < 1.5 * before


def test_a_row_inherits_nothing_from_one_that_had_its_place():
    model = made({"tie_word_embeddings": False}, PoisonedCheckpoint)
    fresh, tokens = made({"tie_word_embeddings": False}, PoisonedCheckpoint), tuple(TOKENS[:20])
    read(model, Row(0, 0, tokens))
    assert np.isnan(read(model, Row(1, 0, (POISON,) * 40))).all()
    model.release(1)
    np.testing.assert_array_equal(read(model, Row(2, 0, tokens)), read(fresh, Row(0, 0, tokens)))


def test_a_row_that_begins_anew_is_in_the_class_of_its_own_tokens():
    model = made()
    model.forward(Step((Row(0, 0, tuple(TOKENS[:600]), 0),)))
    model.forward(Step((Row(0, 0, tuple(TOKENS[:30]), 0),)))
    assert model._slabs.nbytes == model.state_nbytes(30)


@pytest.mark.parametrize("tokens", [190, 230, 256, 600])
def test_what_is_held_was_not_overwritten_by_drafts_that_were_taken_back(tokens: int):
    windowed = {"architectures": ["MistralForCausalLM"], "sliding_window": 200}
    ring, whole = made(windowed, longest_step=56), made(windowed, longest_step=1000)
    for begin in range(0, tokens, 50):
        ring.forward(Step((Row(0, begin, tuple(TOKENS[begin : min(begin + 50, tokens)]), 0),)))
    drafts = tuple(TOKENS[-ring.draft_room(tokens) :])
    ring.forward(Step((Row(0, tokens, (TOKENS[tokens], *drafts), 0),)))
    whole.forward(Step((Row(0, 0, tuple(TOKENS[: tokens + 1]), 0),)))
    first = ring.first_held(tokens + 1)
    assert first <= max(0, tokens + 1 - 200), "what the window needs is held"
    said, expected = (model.segment(0, tokens + 1, first, tokens + 1) for model in (ring, whole))
    for (name, array), (_, wanted) in zip(said.arrays(), expected.arrays(), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-4, err_msg=name)


def test_what_runs_beside_a_row_changes_its_bits_by_its_number_only():
    model = made()
    for slot in range(4):
        model.forward(Step((Row(slot, 0, tuple(TOKENS[slot : slot + 40]), 0),)))
    said = read(model, Row(0, 40, (5,)), Row(1, 40, (6,)))
    np.testing.assert_array_equal(read(model, Row(0, 40, (5,)), Row(1, 40, (6,))), said)
    np.testing.assert_array_equal(read(model, Row(0, 40, (5,)), Row(2, 40, (99,)))[0], said[0])
    np.testing.assert_allclose(read(model, Row(0, 40, (5,)))[0], said[0], rtol=0, atol=1e-5)
