"""Vision towers on both executors: each operation against numpy, and how a checkpoint's tensors get there."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from models.errors import CheckpointError
from models.executors.base import EncodedPicture, PictureEncoder
from models.executors.footprint import Footprint
from models.ops import Attention, Embedding, Joined, LayerNorm, Linear, weights_in
from models.quantization import Packed, QuantizationSpec, Tensor, dequantize
from models.sources.base import NamedTensor, TensorInfo
from models.vision.base import Given, Tower
from models.weights.matching import tower_tensors_of
from tests.models.executors.checkpoints import packed

TOLERANCE = 2e-5
TOKENS, WIDTH = 24, 64
EXECUTORS = ("onnx", "mlx")
Array = np.ndarray


@dataclass(frozen=True)
class Stored:
    """Implements `Checkpoint`: what a tower declares, random, and whatever else is said."""

    tower: Tower
    values: Mapping[str, Tensor] = field(default_factory=dict)
    renamed: Callable[[str], str] = str
    reference: str = "stored"
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return 0

    def read(self, name: str) -> bytes | None:
        return None

    def all(self) -> dict[str, Tensor]:
        declared = dict(tensor for weight in weights_in(self.tower.weights) for tensor in weight.tensors())
        return {name: value(name, shape) for name, shape in declared.items()} | dict(self.values)

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        for name, each in self.all().items():
            if isinstance(each, np.ndarray):
                yield TensorInfo(self.renamed(name), each.shape, 4 * each.size, quantized=False, file="f", kind="F32")
            else:
                assert isinstance(each, Packed)
                own = self.renamed(name)
                yield TensorInfo(own, each.shape, 1, quantized=True, file="f", kind="affine", spec=each.spec)

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        for name, each in self.all().items():
            yield NamedTensor(self.renamed(name), lambda each=each: each, "f")


def value(name: str, shape: tuple[int, ...]) -> Array:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.normal(0.3 if len(shape) == 1 else 0, 1 / shape[-1] ** 0.5, shape).astype(np.float32)


def numbers(name: str, *shape: int) -> Array:
    return value(f"given {name}", shape)


def tower_of(weights: object, forward: Callable[[Any], Sequence[Any]], width: int = WIDTH, **more: Any) -> Tower:
    return Tower(weights, forward, width, 1, ("tower.",), lambda patches: patches, **more)


def load(kind: str, tower: Tower, checkpoint: Stored | None = None) -> PictureEncoder:
    checkpoint = checkpoint or Stored(tower)
    if kind == "onnx":
        from models.executors.onnx import load_tower as load_onnx

        return load_onnx(checkpoint, tower)
    from models.executors.mlx import load_tower as load_mlx

    return load_mlx(checkpoint, tower)


def footprint(kind: str, checkpoint: Stored) -> Footprint:
    found = tower_tensors_of(checkpoint.tower, checkpoint)
    if kind == "onnx":
        from models.executors.onnx import tower_footprint as footprint_onnx

        return footprint_onnx(checkpoint.tower, found)
    from models.executors.mlx import tower_footprint as footprint_mlx

    return footprint_mlx(checkpoint.tower, found, policy="keep", config={})


def run(encoder: PictureEncoder, *passes: Given) -> EncodedPicture:
    work = encoder.encode(passes)
    while True:
        try:
            next(work)
        except StopIteration as end:
            made: EncodedPicture = end.value
            return made


def made(kind: str, forward: Callable[[Any], Any], given: Given, weights: object = ()) -> Array:
    """What one output of a tower is for what it is given."""
    tower = tower_of(weights, lambda ops: (forward(ops),))
    return run(load(kind, tower), given).rows


def assert_close(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def softmaxed(q: Array, k: Array, v: Array, spec: Attention) -> Array:
    """Attention of all tokens to all. Shapes: (T, heads * d)."""
    heads, shared = spec.heads, spec.heads // spec.kv_heads
    rows = []
    for head in range(heads):
        own, other = (slice(n * spec.head_dim, (n + 1) * spec.head_dim) for n in (head, head // shared))
        scores = q[:, own] @ k[:, other].T * spec.scale
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        rows.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, other])
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_what_is_given_arrives_as_float32(kind: str):
    values = np.arange(6, dtype=np.float64).reshape(3, 2)
    assert_close(made(kind, lambda ops: ops.scale(ops.given("x", 2), 2.0), {"x": values}), values * 2)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_rows_of_a_table_are_those_that_the_host_names(kind: str):
    table = Embedding("tower.table", 7, 4)
    ids = np.array([6, 0, 3, 3])
    found = made(kind, lambda ops: ops.scale(ops.look_up(table, "ids"), 1.0), {"ids": ids}, (table,))
    assert_close(found, value("tower.table.weight", (7, 4))[ids])


@pytest.mark.parametrize("kind", EXECUTORS)
def test_tokens_are_taken_in_the_hosts_order(kind: str):
    x, order = numbers("x", 5, 3), np.array([4, 1, 1])
    assert_close(made(kind, lambda ops: ops.take(ops.given("x", 3), "order"), {"x": x, "order": order}), x[order])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", EXECUTORS)
def test_heads_turn_by_their_tokens_angles(kind: str, interleaved: bool):
    heads, dim = 3, 8
    x, angles = numbers("x", TOKENS, heads * dim), 9 * numbers("angles", TOKENS, dim // 2)
    given = {"x": x, "angles": angles}

    def forward(ops: Any) -> Any:
        return ops.turn(ops.given("x", heads * dim), heads, "angles", interleaved=interleaved)

    found = made(kind, forward, given)
    parted = x.reshape(TOKENS, heads, dim)
    pairs = parted.reshape(TOKENS, heads, -1, 2) if interleaved else parted.reshape(TOKENS, heads, 2, -1).swapaxes(2, 3)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    whole = np.stack([turned.real, turned.imag], axis=-1 if interleaved else 2)
    assert_close(found, whole.reshape(x.shape))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", EXECUTORS)
def test_without_groups_all_tokens_see_each_other(kind: str, kv_heads: int):
    spec = Attention(4, kv_heads, 16, 0.4)
    given = {"q": 3 * numbers("q", TOKENS, 64), **{n: 3 * numbers(n, TOKENS, kv_heads * 16) for n in "kv"}}

    def forward(ops: Any) -> Any:
        return ops.look_around(ops.given("q", 64), ops.given("k", kv_heads * 16), ops.given("v", kv_heads * 16), spec)

    assert_close(made(kind, forward, given), softmaxed(given["q"], given["k"], given["v"], spec))


@pytest.mark.parametrize("lengths", [[9, 4, 11], [8, 8, 8], [24], [1, 23]])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", EXECUTORS)
def test_with_groups_tokens_see_those_of_their_own(kind: str, kv_heads: int, lengths: list[int]):
    spec = Attention(4, kv_heads, 16, 0.4)
    given = {"q": 3 * numbers("q", TOKENS, 64), **{n: 3 * numbers(n, TOKENS, kv_heads * 16) for n in "kv"}}

    def forward(ops: Any) -> Any:
        parts = ops.given("q", 64), ops.given("k", kv_heads * 16), ops.given("v", kv_heads * 16)
        return ops.look_around(*parts, spec, "groups")

    expected, begin = [], 0
    for length in lengths:
        own = slice(begin, begin + length)
        expected.append(softmaxed(given["q"][own], given["k"][own], given["v"][own], spec))
        begin += length
    found = made(kind, forward, {**given, "groups": np.array(lengths)})
    assert_close(found, np.concatenate(expected))


@pytest.mark.parametrize("groups", [[], [9, 4, 11]])
def test_attention_on_mlx_goes_through_long_pictures_in_pieces(monkeypatch: pytest.MonkeyPatch, groups: list[int]):
    from models.executors.mlx import tower as module

    spec = Attention(4, 2, 16, 0.4)
    given: dict[str, Array] = {name: 3 * numbers(name, TOKENS, 64 if name == "q" else 32) for name in "qkv"}
    given |= {"groups": np.array(groups)} if groups else {}

    def forward(ops: Any) -> Any:
        parts = ops.given("q", 64), ops.given("k", 32), ops.given("v", 32)
        return ops.look_around(*parts, spec, "groups" if groups else "")

    whole = made("mlx", forward, given)
    monkeypatch.setattr(module, "MOST_SCORES", 5 * 4 * TOKENS)
    assert_close(made("mlx", forward, given), whole)


@pytest.mark.parametrize("groups", ["", "groups"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", EXECUTORS)
def test_attention_of_a_product_adds_its_biases_once(kind: str, groups: str, bias: bool):
    spec = Attention(4, 4, 16, 0.3)
    qkv = Joined(tuple(Linear(f"tower.{part}", 8, 64, bias) for part in "qkv"))
    x = numbers("x", TOKENS, 8)

    def forward(ops: Any) -> Any:
        q, k, v = ops.split(ops.linear(ops.given("x", 8), qkv), (64, 64, 64))
        return ops.look_around(q, k, v, spec, groups)

    parts = []
    for part in "qkv":
        product = x @ value(f"tower.{part}.weight", (64, 8)).T
        parts.append(product + value(f"tower.{part}.bias", (64,)) if bias else product)
    found = made(kind, forward, {"x": x, "groups": np.array([TOKENS])} if groups else {"x": x}, (qkv,))
    assert_close(found, softmaxed(*parts, spec))


@pytest.mark.parametrize("kind", EXECUTORS)
def test_consecutive_tokens_become_one(kind: str):
    x = numbers("x", 12, 5)
    folded = made(kind, lambda ops: ops.fold(ops.given("x", 5), 4), {"x": x})
    assert_close(folded, x.reshape(3, 20))
    mixed = made(kind, lambda ops: ops.fold(ops.given("x", 5), 4, interleaved=True), {"x": x})
    assert_close(mixed, x.reshape(3, 4, 5).swapaxes(1, 2).reshape(3, 20))
    assert_close(made(kind, lambda ops: ops.pool(ops.given("x", 5), 4), {"x": x}), x.reshape(3, 4, 5).mean(axis=1))


PATCHES = Linear("tower.patches", 2 * 3 * 4, WIDTH, bias=True, axes=(2, 3, 4))
NORM = LayerNorm("tower.norm", WIDTH, 1e-5)


def patched(ops: Any) -> Sequence[Any]:
    return (ops.linear(ops.given("x", 24), PATCHES),)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_convolution_is_a_matrix_wherever_its_channels_are(kind: str):
    tower = tower_of((PATCHES,), patched)
    x = numbers("x", 5, 24)
    stored = value("tower.patches.weight", (WIDTH, 2, 3, 4))
    expected = x @ stored.reshape(WIDTH, 24).T + value("tower.patches.bias", (WIDTH,))
    for kept in (stored, np.moveaxis(stored, 1, -1)):
        encoder = load(kind, tower, Stored(tower, {"tower.patches.weight": kept}))
        assert_close(run(encoder, {"x": x}).rows, expected)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_convolution_of_another_shape_is_refused(kind: str):
    tower = tower_of((PATCHES,), patched)
    for shape in ((WIDTH, 24), (WIDTH, 4, 3, 2), (WIDTH, 3, 2, 4)):
        with pytest.raises(CheckpointError, match="its shape is"):
            load(kind, tower, Stored(tower, {"tower.patches.weight": np.zeros(shape, np.float32)}))


@pytest.mark.parametrize("kind", EXECUTORS)
def test_several_outputs_and_passes_follow_one_another(kind: str):
    def forward(ops: Any) -> Sequence[Any]:
        x = ops.given("x", 3)
        return ops.scale(x, 2.0), ops.scale(x, 3.0), ops.add(x, x)

    passes = [{"x": numbers("one", 2, 3)}, {"x": numbers("other", 5, 3)}]
    found = run(load(kind, tower_of((), forward)), *passes)
    x = np.concatenate([given["x"] for given in passes])
    for own, expected in zip((found.rows, *found.deep), (2 * x, 3 * x, 2 * x), strict=True):
        assert_close(own, expected)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_quantised_weights_stay_so_and_inputs_are_not_rounded(kind: str):
    matrix = Linear("tower.matrix", 128, WIDTH)
    tower = tower_of((matrix,), lambda ops: (ops.linear(ops.given("x", 128), matrix),))
    rng = np.random.default_rng(3)
    stored = packed(np.zeros((WIDTH, 128), np.float32), QuantizationSpec("affine", 4, 64), rng)
    checkpoint = Stored(tower, {"tower.matrix.weight": stored})
    encoder = load(kind, tower, checkpoint)
    x = numbers("x", 7, 128)
    assert_close(run(encoder, {"x": x}).rows, x @ dequantize(stored).T)
    assert encoder.memory_bytes() < WIDTH * 128 * 4 / 2
    assert encoder.memory_bytes() == footprint(kind, checkpoint).weights


def whole_tower() -> Tower:
    table = Embedding("tower.table", 9, WIDTH)

    def forward(ops: Any) -> Sequence[Any]:
        return (ops.layer_norm(ops.add(*patched(ops), ops.look_up(table, "ids")), NORM),)

    return tower_of((PATCHES, table, NORM), forward)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_the_predictor_knows_what_is_held(kind: str):
    tower = whole_tower()
    encoder = load(kind, tower)
    assert encoder.memory_bytes() == footprint(kind, Stored(tower)).weights
    encoder.close()
    assert encoder.memory_bytes() == 0


@pytest.mark.parametrize("kind", EXECUTORS)
def test_names_may_have_a_model_in_front_and_others_are_not_looked_at(kind: str):
    tower = whole_tower()
    others = {"language_model.norm.weight": np.ones(3, np.float32), "lm_head.weight": np.ones((2, 2), np.float32)}
    given = {"x": numbers("x", 3, 24), "ids": np.array([1, 2, 8])}
    plain = run(load(kind, tower), given).rows
    for renamed in (str, lambda name: f"model.{name}"):
        assert np.array_equal(run(load(kind, tower, Stored(tower, others, renamed)), given).rows, plain)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_tensor_under_the_prefixes_that_nobody_declares_is_refused(kind: str):
    tower = whole_tower()
    stray = Stored(tower, {"model.tower.head.weight": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"model\.tower\.head\.weight.*no such tensor"):
        load(kind, tower, stray)
    load(kind, replace(tower, other_parts=("tower.head.",)), stray).close()


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_tensor_that_is_not_there_is_named(kind: str):
    tower = whole_tower()
    lacking = Stored(tower, renamed=lambda name: name.replace("tower.norm.bias", "elsewhere.bias"))
    with pytest.raises(CheckpointError, match=r"tower\.norm\.bias.*is missing"):
        load(kind, tower, lacking)


def test_a_graph_of_several_sessions_yields_between_them_and_may_be_given_up(monkeypatch: pytest.MonkeyPatch):
    from models.executors.onnx import tower as module

    monkeypatch.setattr(module, "PART_BYTES", 1)
    tower = whole_tower()
    encoder = load("onnx", tower)
    given = {"x": numbers("x", 3, 24), "ids": np.array([1, 2, 8])}
    expected = run(encoder, given).rows
    work, other = encoder.encode([given, given]), encoder.encode([given])
    yields = 0
    for yields, _ in enumerate(work, 1):
        next(other, None)
        if yields == 3:
            other.close()
    assert yields > 3
    assert np.array_equal(run(encoder, given).rows, expected)
