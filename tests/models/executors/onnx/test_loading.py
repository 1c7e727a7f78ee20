import numpy as np
import pytest

from models.arch import build_model
from models.errors import CheckpointError, ExecutionError, QuantizationError
from models.executors.base import Row, Step
from models.executors.onnx import OnnxExecutor, OnnxOptions, filling, footprint, load
from models.executors.onnx.attention import AttentionNodes
from models.executors.onnx.forms import DENSE
from models.executors.onnx.graph import Graph
from models.executors.onnx.kernels import EXACT
from models.executors.onnx.products import ProductNodes
from models.executors.onnx.recorder import Recorder
from models.ops import KV, Attention, Embedding, Linear, weights_in
from models.quantization import dequantize
from models.weights.matching import matched
from tests.models.executors.checkpoints import CONFIG, KINDS, RandomCheckpoint

TOKENS = tuple(np.random.default_rng(1).integers(0, 320, 50).tolist())


def logits(kind: str, **options: object) -> np.ndarray:
    checkpoint = RandomCheckpoint(kind, CONFIG)
    model = build_model(checkpoint.config)
    executor = OnnxExecutor(load(checkpoint, model, OnnxOptions(capacity=128, **options)), model.config.vocab_size)
    found = executor.forward(Step((Row(0, 0, TOKENS, len(TOKENS)),)))
    assert found is not None
    return found.read()


def held(kind: str, **options: object) -> int:
    checkpoint = RandomCheckpoint(kind, CONFIG)
    return load(checkpoint, build_model(checkpoint.config), OnnxOptions(capacity=64, **options)).weight_bytes


class Widened(RandomCheckpoint):
    """The same values, stored in float32."""

    def value(self, name, shape):
        value = super().value(name, shape)
        return value if isinstance(value, np.ndarray) else dequantize(value)


def widened(kind: str) -> np.ndarray:
    checkpoint = Widened(kind, CONFIG)
    model = build_model(checkpoint.config)
    loaded = load(checkpoint, model, OnnxOptions(weights="float32", capacity=128))
    found = OnnxExecutor(loaded, 320).forward(Step((Row(0, 0, TOKENS, len(TOKENS)),)))
    assert found is not None
    return found.read()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "F32"])
def test_weights_are_exactly_the_files_values(kind: str):
    expected = widened(kind)
    np.testing.assert_allclose(logits(kind, weights="float32"), expected, atol=1e-5)
    if kind.startswith("Q4") or kind == "affine4":
        # Kept in four bits, with activations that are not rounded.
        np.testing.assert_allclose(logits(kind, activations="float32"), expected, atol=2e-4)


def test_mxfp8_is_widened_or_rounded_at_load_where_that_is_asked_for():
    expected, form = widened("mxfp8"), {"int8": 0.04, "int4": 0.4}
    np.testing.assert_allclose(logits("mxfp8", activations="float32"), expected, atol=1e-5)
    bytes_held = {choice: held("mxfp8", weights=choice) for choice in ("keep", *form)}
    assert bytes_held["int4"] < bytes_held["int8"] < bytes_held["keep"] / 2
    for choice, bound in form.items():
        difference = np.abs(logits("mxfp8", weights=choice) - expected)
        assert 0 < difference.std() < bound * expected.std()


def test_neighbouring_blocks_of_mxfp4_are_held_as_one_but_in_the_matrix_where_they_differ_too_much():
    near, apart = held("mxfp4"), held("mxfp4 apart")
    assert near < 0.9 * apart


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "F32"])
def test_rounding_activations_moves_logits_by_little(kind: str):
    expected = widened(kind)
    difference = np.abs(logits(kind) - expected)
    assert difference.std() < 0.08 * expected.std()
    assert difference.max() > 0


@pytest.mark.parametrize("threads", [1, 4])
def test_a_model_in_many_parts_is_the_model_in_one(threads: int, monkeypatch: pytest.MonkeyPatch):
    whole = logits("Q4_1")
    monkeypatch.setattr(filling, "PART_BYTES", 1)
    monkeypatch.setattr(filling, "PARTS", 1000)
    np.testing.assert_array_equal(logits("Q4_1", threads=threads), whole)


def test_progress_ends_at_one_and_may_abandon_the_load():
    checkpoint, seen = RandomCheckpoint("Q8_0", CONFIG), []
    model = build_model(checkpoint.config)
    load(checkpoint, model, OnnxOptions(capacity=64), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0

    def abandon(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(checkpoint, model, OnnxOptions(capacity=64), progress=abandon)


class Lacking(RandomCheckpoint):
    """Without its last norm."""

    def _shapes(self):
        return (each for each in super()._shapes() if each[0] != "model.norm.weight")


class Renamed(RandomCheckpoint):
    """With a tensor that nobody asked for."""

    def _shapes(self):
        yield from super()._shapes()
        yield "model.layers.0.mlp.extra.weight", (4, 32)


class Misshaped(RandomCheckpoint):
    """With a norm that is too long."""

    def _shapes(self):
        return ((name, (257,) if name == "model.norm.weight" else shape) for name, shape in super()._shapes())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Lacking, r"model\.norm\.weight: is missing"),
        (Renamed, r"mlp\.extra\.weight: the architecture has no such tensor"),
        (Misshaped, r"model\.norm\.weight: its shape is \[257\], and config\.json asks for \[256\]"),
    ],
)
def test_tensors_that_do_not_pair_off_are_named(kind: type[RandomCheckpoint], words: str):
    checkpoint = kind("F32", CONFIG)
    with pytest.raises(CheckpointError, match=words):
        load(checkpoint, build_model(CONFIG), OnnxOptions(capacity=64))


def test_heads_that_a_quantised_cache_cannot_hold_are_refused():
    config = CONFIG | {"head_dim": 16}
    with pytest.raises(QuantizationError, match=r"q8_0 cache needs heads of a multiple of 32 .* this model's have 16"):
        load(RandomCheckpoint("F32", config), build_model(config), OnnxOptions(capacity=64, cache_type="q8_0"))


def test_a_graph_that_the_library_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("models.executors.onnx.graph.OPSET", 9999)
    with pytest.raises(ExecutionError, match=r"ONNX Runtime refuses the graph: [^\n]+$"):
        load(RandomCheckpoint("F32", CONFIG), build_model(CONFIG), OnnxOptions(capacity=64))


@pytest.mark.parametrize("kind", KINDS)
def test_the_footprint_is_what_is_held(kind: str):
    checkpoint = RandomCheckpoint(kind, CONFIG)
    model = build_model(checkpoint.config)
    found = matched(weights_in(model.weights), checkpoint.infos(), "")
    predicted = footprint(model, found, OnnxOptions(capacity=64))
    loaded = load(checkpoint, model, OnnxOptions(capacity=64))
    tables = sum(table.nbytes for table in loaded.tables.values())
    assert predicted.weights - predicted.embedding == loaded.weight_bytes - tables
    assert len(predicted.layers) == len(predicted.state(10)) == 3
    assert len(set(predicted.layers)) == 1
    executor = OnnxExecutor(loaded, 320)
    assert sum(predicted.state(64)) == executor.state_nbytes(64) == executor.state_nbytes(50)


def test_queries_keys_and_values_split_from_one_product_go_into_attention_as_they_are():
    graph = Graph()
    attention = AttentionNodes(graph, [KV(1, 16, 16)], "f16")
    fused, out = Linear("fused", 32, 48), Linear("out", 16, 32)
    forms = dict.fromkeys(("fused.weight", "out.weight"), DENSE)
    recorder = Recorder(graph, ProductNodes(graph, forms, level=EXACT, finely=True), attention)
    q, k, v = recorder.split(recorder.linear(recorder.embed(Embedding("embed", 9, 32)), fused), (16, 16, 16))
    said = recorder.linear(recorder.attention(q, k, v, 0, Attention(1, 1, 16, 0.25)), out).name
    assert said
    assert not {"Split", "Concat"} & {node.op for node in graph.nodes}
