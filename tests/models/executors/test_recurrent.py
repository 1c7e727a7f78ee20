"""Recurrent layers on both executors: against loops over tokens, cut anyhow, in company, taken back and restored."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from models.arch import Model
from models.executors.base import Executor, Row, Step
from models.executors.mlx import load as load_mlx
from models.executors.onnx import OnnxExecutor, OnnxOptions
from models.executors.onnx import load as load_onnx
from models.executors.onnx.products import ProductNodes
from models.executors.replay import MOST_REPLAYED
from models.ops import (
    DeltaRule,
    Embedding,
    Linear,
    Ops,
    Recurrent,
    ShortConv,
    StateSpace,
    Vector,
    weights_in,
)
from models.sources.base import NamedTensor, TensorInfo

VOCAB, WIDTH, HEADS, DIM = 64, 64, 6, 16
"""Widths as models have them: narrow float32 products are summed in another order for one token than for several."""
CONV = ShortConv("layers.0.conv", WIDTH, 4, bias=True)
DELTA = DeltaRule(2, HEADS, 8, DIM, Vector("layers.0.a_log", HEADS), Vector("layers.0.dt_bias", HEADS))
SPACE = StateSpace(
    HEADS,
    DIM,
    2,
    8,
    Vector("layers.0.a_log", HEADS),
    Vector("layers.0.dt_bias", HEADS),
    Vector("layers.0.d", HEADS),
    least_dt=0.02,
    most_dt=1.2,
)
CAPACITY = 20_512
TOKENS = tuple(np.random.default_rng(4).integers(0, VOCAB, 300).tolist())
Floats = np.ndarray


@dataclass(frozen=True, slots=True)
class Config:
    """Implements `ModelConfig`."""

    vocab_size: int = VOCAB
    hidden_size: int = WIDTH
    intermediate_size: int = WIDTH
    num_heads: int = HEADS
    num_layers: int = 1


@dataclass(frozen=True, slots=True)
class Weights:
    """An embedding, a convolution, the layer's inputs and vectors, and the output."""

    embed: Embedding
    conv: ShortConv
    project: Linear
    vectors: tuple[Vector, ...]
    head: Linear


def delta_model() -> Model:
    sizes = (16, 16, HEADS * DIM, HEADS, HEADS)
    weights = _weights(sizes, (DELTA.a_log, DELTA.dt_bias))

    def forward(ops: Ops[Any]) -> Any:
        q, k, v, a, b = _inputs(ops, weights, sizes)
        return ops.delta_rule(q, k, v, a, b, layer=1, spec=DELTA)

    return _model(weights, forward, DELTA.shape)


def space_model() -> Model:
    sizes = (HEADS * DIM, 16, 16, HEADS)
    weights = _weights(sizes, (SPACE.a_log, SPACE.dt_bias, SPACE.d))

    def forward(ops: Ops[Any]) -> Any:
        x, b, c, dt = _inputs(ops, weights, sizes)
        return ops.state_space(x, b, c, dt, layer=1, spec=SPACE)

    return _model(weights, forward, SPACE.shape)


def _weights(sizes: tuple[int, ...], vectors: tuple[Vector, ...]) -> Weights:
    project = Linear("layers.0.project", WIDTH, sum(sizes))
    return Weights(Embedding("embed", VOCAB, WIDTH), CONV, project, vectors, Linear("head", HEADS * DIM, VOCAB))


def _inputs(ops: Ops[Any], weights: Weights, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    mixed = ops.activate(ops.short_conv(ops.embed(weights.embed), weights.conv, 0), "silu")
    return ops.split(ops.linear(mixed, weights.project), sizes)


def _model(weights: Weights, forward: Callable[[Ops[Any]], Any], shape: tuple[int, ...]) -> Model:
    state = (Recurrent(CONV.shape), Recurrent(shape))
    return Model(Config(), CAPACITY, weights, state, forward, lambda ops, x: ops.linear(x, weights.head))


PLACES = ("onnx", "onnx, exact", "onnx, exact, even", "mlx")
MODELS = {"delta rule": delta_model, "state space": space_model}


@dataclass(frozen=True)
class MadeUp:
    """Implements `Checkpoint` for a model, in float32."""

    model: Model
    reference: str = "random"
    config: Mapping[str, Any] = field(default_factory=dict)

    def read(self, name: str) -> bytes | None:
        return None

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        for name, shape in self._shapes():
            yield TensorInfo(name, shape, 4 * int(np.prod(shape)), quantized=False, file="f", kind="F32")

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        for name, shape in self._shapes():
            yield NamedTensor(name, lambda name=name, shape=shape: value(name, shape), "f")

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for weight in weights_in(self.model.weights):
            yield from weight.tensors()


def value(name: str, shape: tuple[int, ...]) -> Floats:
    narrow = len(shape) == 2 and not name.startswith("embed")
    spread = 0.6 / shape[1] ** 0.5 if narrow else 0.6
    return np.random.default_rng(zlib.crc32(name.encode())).normal(0, spread, shape).astype(np.float32)


def expected(kind: str, tokens: tuple[int, ...]) -> Floats:
    """The logits of every token, by loops in float64."""
    weights = MODELS[kind]().weights
    held = {
        name: value(name, shape).astype(np.float64) for each in weights_in(weights) for name, shape in each.tensors()
    }
    x = held["embed.weight"][list(tokens)]
    padded = np.concatenate([np.zeros((3, WIDTH)), x])
    taps = held["layers.0.conv.weight"][:, 0]
    mixed = sum(padded[tap : tap + len(x)] * taps[:, tap] for tap in range(4)) + held["layers.0.conv.bias"]
    mixed = mixed / (1 + np.exp(-mixed))
    rates, bias = np.exp(held["layers.0.a_log"]), held["layers.0.dt_bias"]
    outputs = (_delta if kind == "delta rule" else _space)(mixed @ held["layers.0.project.weight"].T, rates, bias, held)
    return outputs @ held["head.weight"].T


def _delta(made: Floats, rates: Floats, bias: Floats, held: dict[str, Floats]) -> Floats:
    state, outputs = np.zeros((HEADS, 8, DIM)), []
    for queries, keys, v, a, b in zip(*np.split(made, [16, 32, 128, 134], axis=1), strict=True):
        q, k = (np.repeat(part.reshape(2, 8), 3, axis=0) for part in (queries, keys))
        q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
        state = state * np.exp(-rates * np.log1p(np.exp(a + bias)))[:, None, None]
        missing = v.reshape(HEADS, DIM) - np.einsum("hkv,hk->hv", state, k)
        state = state + np.einsum("hk,hv->hkv", k, missing / (1 + np.exp(-b))[:, None])
        outputs.append(np.einsum("hkv,hk->hv", state, q * 8**-0.5).reshape(-1))
    return np.stack(outputs)


def _space(made: Floats, rates: Floats, bias: Floats, held: dict[str, Floats]) -> Floats:
    state, outputs = np.zeros((HEADS, DIM, 8)), []
    for inputs, keys, queries, step in zip(*np.split(made, [96, 112, 128], axis=1), strict=True):
        x = inputs.reshape(HEADS, DIM)
        b, c = (np.repeat(part.reshape(2, 8), 3, axis=0) for part in (keys, queries))
        dt = np.clip(np.log1p(np.exp(step + bias)), 0.02, 1.2)
        state = state * np.exp(-rates * dt)[:, None, None] + np.einsum("hp,hn->hpn", x * dt[:, None], b)
        outputs.append((np.einsum("hpn,hn->hp", state, c) + x * held["layers.0.d"][:, None]).reshape(-1))
    return np.stack(outputs)


@pytest.fixture(scope="module", params=[(kind, where) for kind in MODELS for where in PLACES])
def made(request: pytest.FixtureRequest) -> tuple[str, Executor]:
    kind, where = request.param
    model = MODELS[kind]()
    if where == "mlx":
        return kind, load_mlx(MadeUp(model), model, depth=0)
    options = OnnxOptions(slots=4, capacity=CAPACITY, threads=2, drafts="exact" in where)
    with pytest.MonkeyPatch.context() as patch:
        if where.endswith("even"):
            patch.setattr(ProductNodes, "any_wants_even_rows", True)
        return kind, OnnxExecutor(load_onnx(MadeUp(model), model, options), VOCAB)


@pytest.fixture
def loaded(made: tuple[str, Executor]) -> Iterator[tuple[str, Executor]]:
    yield made
    for slot in range(4):
        made[1].release(slot)


def tolerance(loaded: tuple[str, Executor]) -> float:
    """On a CPU the cuts and company of a row change nothing where that is asked for; on MLX rows round together."""
    _, executor = loaded
    if not isinstance(executor, OnnxExecutor):
        return 2e-5
    assert executor._loaded is not None
    return 0.0 if executor._loaded.looks_twice else 2e-5


def fed(executor: Executor, slot: int, begin: int, end: int, *others: Row) -> Floats:
    """The logits of a row's tokens [begin, end), beside others."""
    rows = (Row(slot, begin, TOKENS[begin:end], end - begin), *others)
    logits = executor.forward(Step(rows))
    assert logits is not None
    return logits.read()[: end - begin].copy()


def test_a_row_is_what_a_loop_over_its_tokens_makes_of_it(loaded: tuple[str, Executor]):
    kind, executor = loaded
    np.testing.assert_allclose(fed(executor, 0, 0, 300), expected(kind, TOKENS), atol=2e-5)


def test_a_chunk_of_one_token_over_and_over_is_what_a_loop_makes_of_it(loaded: tuple[str, Executor]):
    """All keys are alike then, and what each brings hangs on all before it."""
    kind, executor = loaded
    for token in range(0, VOCAB, 9):
        executor.release(0)
        logits = executor.forward(Step((Row(0, 0, (token,) * 60, 60),)))
        assert logits is not None
        np.testing.assert_allclose(logits.read(), expected(kind, (token,) * 60), atol=2e-5)


@pytest.mark.parametrize("cuts", [(1, 2, 3, 70, 71, 150), (64, 128, 192, 256), (5, 130)])
def test_a_row_may_be_cut_anywhere(loaded: tuple[str, Executor], cuts: tuple[int, ...]):
    _, executor = loaded
    whole = fed(executor, 0, 0, 300)
    executor.release(0)
    ends = (*cuts, 300)
    parts = [fed(executor, 0, begin, end) for begin, end in zip((0, *cuts), ends, strict=True)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=tolerance(loaded))


def test_company_of_any_length_changes_nothing(loaded: tuple[str, Executor]):
    _, executor = loaded
    alone = fed(executor, 2, 0, 9)
    executor.release(2)
    others = (Row(3, 0, TOKENS[100:103], 1), Row(0, 0, TOKENS[200:201], 1))
    np.testing.assert_allclose(fed(executor, 2, 0, 9, *others), alone, rtol=0, atol=tolerance(loaded))
    # Slot 1 stays idle between them, and a row that goes on finds its own state.
    follow = fed(executor, 3, 0, 1), executor.forward(Step((Row(0, 1, TOKENS[201:204], 3),)))
    assert follow[1] is not None
    executor.release(0)
    fresh = executor.forward(Step((Row(0, 0, TOKENS[200:204], 3),)))
    assert fresh is not None
    np.testing.assert_allclose(follow[1].read(), fresh.read(), rtol=0, atol=tolerance(loaded))


def test_drafts_that_are_taken_back_leave_no_trace(loaded: tuple[str, Executor]):
    _, executor = loaded
    whole = fed(executor, 0, 0, 120)
    executor.release(0)
    made, at = [fed(executor, 0, 0, 40)], 40
    executor.release(0)
    executor.forward(Step((Row(0, 0, TOKENS[:40], 1),)))
    rng = np.random.default_rng(1)
    while at < 110:
        right = int(rng.integers(0, 5))
        wrong = tuple((token + 1) % VOCAB for token in TOKENS[at + right + 1 : at + 6])
        logits = executor.forward(Step((Row(0, at, (*TOKENS[at : at + right + 1], *wrong), 1 + right + len(wrong)),)))
        assert logits is not None
        made.append(logits.read()[: right + 1].copy())
        at += right + 1
    np.testing.assert_allclose(np.concatenate(made), whole[:at], rtol=0, atol=tolerance(loaded))


def test_a_long_replay_has_a_pass_of_its_own(loaded: tuple[str, Executor]):
    _, executor = loaded
    whole = fed(executor, 0, 0, 90)
    executor.release(0)
    fed(executor, 0, 0, 50)
    drafted = MOST_REPLAYED + 6
    wrong = tuple((token + 1) % VOCAB for token in TOKENS[50 + drafted : 60 + drafted])
    executor.forward(Step((Row(0, 50, (*TOKENS[50 : 50 + drafted], *wrong), drafted + len(wrong)),)))
    last = fed(executor, 0, 50 + drafted, 90)
    np.testing.assert_allclose(last, whole[50 + drafted :], rtol=0, atol=tolerance(loaded))


def test_a_row_goes_on_from_a_checkpoint_that_went_through_a_file(loaded: tuple[str, Executor]):
    _, executor = loaded
    whole = fed(executor, 0, 0, 120)
    executor.release(0)
    fed(executor, 0, 0, 70)
    segment, kept = executor.segment(0, 70, 0, 70), executor.checkpoint(0, 70)
    assert executor.needs_checkpoints
    assert kept is not None
    fed(executor, 0, 70, 100)
    read = executor.read_checkpoint({name: array.copy() for name, array in kept.arrays()})
    assert read.nbytes == kept.nbytes > 0
    executor.restore(1, [executor.read_segment(dict(segment.arrays()), 70)], read)
    np.testing.assert_allclose(fed(executor, 1, 70, 120), whole[70:], rtol=0, atol=tolerance(loaded))


def test_there_is_no_checkpoint_where_the_state_does_not_stand(loaded: tuple[str, Executor]):
    _, executor = loaded
    fed(executor, 0, 0, 70)
    assert executor.checkpoint(0, 69) is None
    executor.forward(Step((Row(0, 70, TOKENS[70:75], 5),)))
    assert executor.checkpoint(0, 72) is None
    assert executor.checkpoint(0, 75) is not None


def test_a_checkpoint_of_another_model_is_refused(loaded: tuple[str, Executor]):
    _, executor = loaded
    fed(executor, 0, 0, 7)
    kept = executor.checkpoint(0, 7)
    assert kept is not None
    arrays = dict(kept.arrays())
    name = next(iter(arrays))
    for other in ({}, arrays | {name: arrays[name][1:]}, arrays | {name: arrays[name].astype(np.float16)}):
        with pytest.raises(ValueError, match="its array"):
            executor.read_checkpoint(other)


def test_what_a_row_takes_does_not_grow_with_its_tokens(loaded: tuple[str, Executor]):
    _, executor = loaded
    state = 4 * (3 * WIDTH + HEADS * DIM * 8)
    assert executor.state_nbytes(0) == 0
    assert executor.state_nbytes(10) == executor.state_nbytes(500) == state


def test_twenty_thousand_tokens_in_chunks_are_those_in_one(loaded: tuple[str, Executor]):
    """The state is float32, so what rounding there is does not grow with the row."""
    _, executor = loaded
    tokens = tuple(np.random.default_rng(5).integers(0, VOCAB, 20_000).tolist())
    whole = executor.forward(Step((Row(0, 0, tokens, 8),)))
    assert whole is not None
    expected = whole.read().copy()
    for begin in range(0, 20_000, 512):
        part = executor.forward(Step((Row(1, begin, tokens[begin : begin + 512], 8),)))
    assert part is not None
    np.testing.assert_allclose(part.read(), expected, rtol=0, atol=tolerance(loaded))


@pytest.mark.parametrize("kind", MODELS)
def test_on_mlx_a_longer_chunk_has_no_more_operations(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = MODELS[kind]()
    executor = load_mlx(MadeUp(model), model, depth=0)
    # One kernel on a GPU; MLX's CPU backend makes a loop of it.
    monkeypatch.setattr(mx.fast, "gated_delta_update", lambda q, k, v, gamma, beta, state: (v, state))

    def operations(length: int) -> int:
        built = executor.built(Step((Row(0, 0, tuple(range(64)) * (length // 64), 1),)))
        assert built is not None
        mx.export_to_dot(str(tmp_path / "graph"), built.values)
        return (tmp_path / "graph").read_text().count("shape=rectangle")

    assert 10 < operations(128) == operations(512)
