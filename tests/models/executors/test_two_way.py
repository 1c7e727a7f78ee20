"""Runs of a picture's tokens that look both ways: over windows that have moved, and in whatever the state is held."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from models.arch import build_model
from models.executors.base import EncodedPicture, Executor, Row, Span, Step
from tests.models.executors.checkpoints import CONFIG, SHARED, RandomCheckpoint

GEMMA3 = CONFIG | {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 4,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
}
BEGIN, END, LENGTH = 330, 370, 400
"""Where the picture stands; the windows have moved before it, and it is longer than they are."""
TOKENS = tuple(np.random.default_rng(4).integers(0, 320, LENGTH).tolist())
PICTURE = EncodedPicture(np.random.default_rng(5).normal(size=(END - BEGIN, 256)).astype(np.float32) * 0.1)


def executor(kind: str, cache_type: str = "f16", config: Any = GEMMA3) -> Executor:
    checkpoint = RandomCheckpoint("F32", config)
    model = build_model(checkpoint.config)
    if kind == "onnx":
        from models.executors.onnx import OnnxExecutor, OnnxOptions
        from models.executors.onnx import load as load_onnx

        options = OnnxOptions(
            weights="float32", slots=3, capacity=512, threads=2, cache_type=cache_type, pictures=LENGTH
        )
        return OnnxExecutor(load_onnx(checkpoint, model, options), model.config.vocab_size)
    from models.executors.mlx import load as load_mlx

    return load_mlx(checkpoint, model, policy="float32", cache_type=cache_type, longest_step=LENGTH)


def row(slot: int, begin: int, end: int) -> Row:
    spans, runs = (), ()
    if begin <= BEGIN and end >= END:
        spans, runs = (Span(BEGIN - begin, PICTURE, 0, END - BEGIN),), ((BEGIN - begin, END - begin),)
    return Row(slot, begin, TOKENS[begin:end], end - begin, spans=spans, runs=runs)


def read(run_by: Executor, slot: int, *bounds: int) -> np.ndarray:
    """The logits of a row that is run in these pieces."""
    found = [run_by.forward(Step((row(slot, a, b),))) for a, b in pairwise(bounds)]
    return np.concatenate([np.array(logits.read()) for logits in found if logits is not None])


@pytest.mark.parametrize("config", [GEMMA3, SHARED], ids=["gemma3", "gemma4"])
def test_the_executors_agree_however_the_row_was_cut(config: Any):
    ways = [(0, 256, BEGIN, END, LENGTH), (0, 100, 310, 390, LENGTH), (0, LENGTH)]
    whole = read(executor("mlx", config=config), 0, *ways[-1])
    on_cpu = executor("onnx", config=config)
    for way in ways:
        np.testing.assert_allclose(read(on_cpu, 0, *way), whole, rtol=0, atol=3e-4)
    on_mlx = executor("mlx", config=config)
    np.testing.assert_allclose(read(on_mlx, 0, *ways[0]), whole, rtol=0, atol=3e-4)


@pytest.mark.parametrize("config", [GEMMA3, SHARED], ids=["gemma3", "gemma4"])
def test_a_quantised_cache_sees_what_it_holds(config: Any):
    held = executor("onnx", "q8_0", config)
    whole = read(held, 0, 0, LENGTH)
    apart = np.abs(read(held, 1, 0, 256, BEGIN, END, LENGTH) - whole)
    # A value between two codes may become either; seldom, and the codes are near each other.
    assert apart.max() < 2e-2
    assert apart.mean() < 1e-3
    plain = read(executor("onnx", config=config), 0, 0, LENGTH)
    assert 0 < np.abs(whole - plain).mean() < 0.1 * plain.std()


def test_a_token_at_the_runs_beginning_sees_its_end():
    """Another last row of the picture changes what is said behind its first token."""
    other = EncodedPicture(np.concatenate([PICTURE.rows[:-1], -PICTURE.rows[-1:]]))
    run_by = executor("onnx")
    first = read(run_by, 0, 0, LENGTH)[BEGIN]
    whole = row(1, 0, LENGTH)
    changed = Row(1, 0, TOKENS, LENGTH, spans=(Span(BEGIN, other, 0, END - BEGIN),), runs=whole.runs)
    logits = run_by.forward(Step((changed,)))
    assert logits is not None
    assert np.abs(logits.read()[BEGIN] - first).max() > 1e-3


def test_a_row_beside_one_with_a_run_keeps_its_bits():
    run_by = executor("onnx")
    read(run_by, 0, 0, 50)
    alone = run_by.forward(Step((Row(0, 50, TOKENS[50:51], 1),)))
    assert alone is not None
    kept = np.array(alone.read())
    beside = run_by.forward(Step((Row(0, 50, TOKENS[50:51], 1), row(1, 0, LENGTH))))
    assert beside is not None
    np.testing.assert_array_equal(np.array(beside.read())[:1], kept)
