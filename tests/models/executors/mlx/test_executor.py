"""What is MLX's own: classes and rings of slabs, writing in place, steps under way, kinds of weights and caches."""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from models.arch import build_model
from models.errors import QuantizationError
from models.executors.base import Row, Step
from models.executors.mlx import MLXExecutor, footprint, load
from models.executors.mlx.slabs import SMALLEST_CLASS, class_capacity
from models.ops import weights_in
from models.sampling import Draw, Sampling
from models.weights.matching import matched
from tests.models.executors.checkpoints import CONFIG, KINDS, RandomCheckpoint

TOKENS = np.random.default_rng(0).integers(0, 320, 4000).tolist()
GREEDY = Sampling(temperature=0)


def made(kind: str = "F32", changes: dict[str, Any] | None = None, **options: Any) -> MLXExecutor:
    checkpoint = RandomCheckpoint(kind, CONFIG | (changes or {}))
    return load(checkpoint, build_model(checkpoint.config), **({"longest_step": 64} | options))


def windowed(window: int) -> dict[str, Any]:
    return {"architectures": ["MistralForCausalLM"], "sliding_window": window}


@pytest.fixture(scope="module")
def plain() -> Iterator[MLXExecutor]:
    executor = made()
    yield executor
    executor.close()


@pytest.fixture
def model(plain: MLXExecutor) -> Iterator[MLXExecutor]:
    yield plain
    for slot in range(16):
        plain.release(slot)


def read(model: MLXExecutor, *rows: Row) -> np.ndarray:
    logits = model.forward(Step(rows))
    assert logits is not None
    return logits.read()


def whole(model: MLXExecutor, slot: int, tokens: Sequence[int], chunk: int = 64) -> np.ndarray:
    """The logits of every token. Shapes: (L, V)."""
    pieces = []
    for begin in range(0, len(tokens), chunk):
        piece = tuple(tokens[begin : begin + chunk])
        pieces.append(read(model, Row(slot, begin, piece, len(piece))))
    return np.concatenate(pieces)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_a_row_that_outgrows_its_class_in_mid_flight_goes_on_as_if_nothing_had_happened(model: MLXExecutor):
    tokens = TOKENS[: SMALLEST_CLASS + 40]
    expected = whole(model, 9, tokens, chunk=len(tokens))
    said = []
    for begin in range(0, len(tokens), 37):
        own, other = tuple(tokens[begin : begin + 37]), tuple(TOKENS[begin : begin + 5])
        place = 5 * (begin // 37)
        said.append(read(model, Row(0, begin, own, len(own)), Row(1, place, other, 0)))
    assert_close(np.concatenate(said), expected)


def test_rows_of_several_classes_and_lengths_share_a_step(model: MLXExecutor):
    lengths = (10, 300, 1100, 20)
    for slot, length in enumerate(lengths):
        whole(model, slot, TOKENS[slot : slot + length], chunk=512)
    following = [(7,), (8, 9), (7,), (5, 6, 7)]
    rows = [Row(slot, length, following[slot], len(following[slot])) for slot, length in enumerate(lengths)]
    texts = [(*TOKENS[n : n + row.begin], *row.tokens) for n, row in enumerate(rows)]
    alone = [read(model, Row(9, 0, text, row.wanted)) for text, row in zip(texts, rows, strict=True)]
    together = read(model, *rows)
    assert_close(together, np.concatenate(alone))


def test_rows_that_leave_make_room_for_those_behind_them(model: MLXExecutor):
    for slot in range(5):
        whole(model, slot, TOKENS[slot : slot + 50])
    expected = read(model, *(Row(slot, 50, (slot,)) for slot in (1, 3, 4)))
    for slot in (0, 2):
        model.release(slot)
    assert_close(read(model, *(Row(slot, 50, (slot,)) for slot in (1, 3, 4))), expected, 1e-5)
    assert_close(read(model, Row(4, 50, (4,)), Row(1, 50, (1,))), expected[[2, 0]], 1e-5)


@pytest.mark.parametrize("window", [5, 100, 400])
def test_a_ring_says_what_a_whole_slab_says(window: int):
    ring, long = made(changes=windowed(window), longest_step=64), made(changes=windowed(window), longest_step=4096)
    tokens = TOKENS[:1100]
    assert ring.state_nbytes(1200) < long.state_nbytes(1200)
    assert_close(whole(ring, 0, tokens), whole(long, 0, tokens, chunk=1100))
    # Drafts that were wrong are taken back across the place where the ring comes round.
    capacity = ring.specs[0].capacity(class_capacity(1200))
    ring.release(0)
    whole(ring, 0, tokens[: 2 * capacity - 8])
    for begin in range(2 * capacity - 8, 2 * capacity + 8, 4):
        right, wrong = tuple(tokens[begin : begin + 4]), tuple(tokens[:60])
        said = read(ring, Row(1, 0, tuple(tokens[:64]), 0), Row(0, begin, (*right, *wrong), 64))[:4]
        assert_close(said, read(long, Row(0, begin, right, 4)))


@pytest.mark.parametrize("tokens", [30, 300, 1100])
@pytest.mark.parametrize("window", [None, 40])
def test_segments_put_into_another_slot_go_on_alike(tokens: int, window: int | None):
    model = made(changes=windowed(window) if window else None)
    text = TOKENS[:tokens]
    parts = []
    for begin in range(0, tokens, 64):
        end = min(begin + 64, tokens)
        model.forward(Step((Row(0, begin, tuple(text[begin:end]), 0),)))
        parts.append(model.segment(0, end, begin, end))
    assert model.first_held(tokens) == (0 if window is None else max(0, tokens + 63 - 256))
    model.restore(3, [parts[0].part(0, 20), parts[0].part(20, parts[0].length), *parts[1:]])
    following = Row(0, tokens, (5, 6, 7), 3)
    assert_close(read(model, Row(3, tokens, (5, 6, 7), 3)), read(model, following), 1e-5)


def test_segments_of_other_models_are_refused(model: MLXExecutor):
    whole(model, 0, TOKENS[:10])
    arrays = dict(model.segment(0, 10, 0, 10).arrays())
    assert model.read_segment(arrays, 10).length == 10
    with pytest.raises(ValueError, match="not those of this model"):
        model.read_segment({"0.0": arrays["0.0"]}, 10)
    with pytest.raises(ValueError, match=r"its array 0\.0"):
        model.read_segment(arrays | {"0.0": arrays["0.0"].astype(np.float16)}, 10)


def test_slabs_are_written_in_place_whatever_goes_on():
    """A lazy reader of an old slab would copy all of it: with drafts, storing and cancelling nobody is one."""
    model = made(longest_step=512)
    for begin in range(0, 1500, 500):
        model.forward(Step((Row(0, begin, tuple(TOKENS[begin : begin + 500]), 0),)))
    row = model.segment(0, 1500, 0, 1500)
    for slot in range(1, 12):
        model.restore(slot, [row])
    mx.clear_cache()
    one_array = model._slabs.arrays()[0].nbytes
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    kept = []
    # A step of three rows by itself takes a third of an array.
    for n in range(100):
        rows = [Row(slot, 1500 + n, tuple(TOKENS[n : n + 1 + n % 3]), 1 + n % 3) for slot in range(3)]
        read(model, *rows)
        if n % 10 == 0:
            kept = [model.segment(0, 1500 + n, 1400, 1500 + n)]
        if n == 50:
            model.release(11)
    assert kept[0].nbytes > 0
    assert mx.get_peak_memory() - before < one_array


def test_a_step_is_built_on_tokens_that_nobody_has_read():
    eager, lazy = made(), made(depth=1)
    for model in (eager, lazy):
        for slot in range(3):
            model.forward(Step((Row(slot, 0, tuple(TOKENS[slot : slot + 20]), 0),)))
    draws = [Draw(GREEDY, 0.0, slot) for slot in (2, 0, 1)]
    steps = []
    for n in range(5):
        rows = tuple(Row(slot, 20 + n, () if n else (5,)) for slot in (2, 0, 1))
        logits = lazy.forward(Step(rows))
        assert logits is not None
        steps.append(lazy.sample(logits, draws))
    tokens = [5, 5, 5]
    for n, sampled in enumerate(steps):
        rows = tuple(Row(slot, 20 + n, (token,)) for slot, token in zip((2, 0, 1), tokens, strict=True))
        logits = eager.forward(Step(rows))
        assert logits is not None
        tokens = [drawn.token for drawn in eager.sample(logits, draws).read()]
        assert [drawn.token for drawn in sampled.read()] == tokens
    assert len(set(tokens)) > 1
    # Some rows wait, one is known, and the order is another.
    mixed = (Row(1, 25, ()), Row(2, 25, (tokens[0],)), Row(0, 25, ()))
    logits = lazy.forward(Step(mixed))
    known = eager.forward(Step((Row(1, 25, (tokens[2],)), Row(2, 25, (tokens[0],)), Row(0, 25, (tokens[1],)))))
    assert logits is not None
    assert known is not None
    assert_close(logits.read(), known.read(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_weights_say_what_widened_ones_say(kind: str):
    tokens = TOKENS[:30]
    kept, widened = made(kind, policy="keep"), made(kind, policy="float32")
    expected = whole(widened, 0, tokens)
    assert_close(whole(kept, 0, tokens), expected, 1e-3 * float(np.abs(expected).max()))


@pytest.mark.parametrize(("cache_type", "bound"), [("q8_0", 0.02), ("q4_0", 0.3)])
def test_a_quantised_cache_says_nearly_the_same_however_the_row_is_cut(cache_type: str, bound: float):
    tokens = TOKENS[:300]
    quantised, exact = made(cache_type=cache_type), made()
    cut = whole(quantised, 0, tokens, chunk=33)
    # A key that lies between two codes may be rounded to either.
    assert np.abs(cut - whole(quantised, 1, tokens, chunk=300)).mean() < 1e-3
    expected = whole(exact, 0, tokens)
    assert 0 < np.abs(cut - expected).mean() < bound * expected.std()
    assert quantised.state_nbytes(300) < exact.state_nbytes(300) / 2.5


def test_heads_that_a_quantised_cache_cannot_hold_are_refused():
    with pytest.raises(QuantizationError, match=r"q4_0 cache needs heads of a multiple of 32 .* have 16"):
        made(changes={"head_dim": 16}, cache_type="q4_0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["keep", "float32"])
def test_the_footprint_is_what_is_held(kind: str, policy: str):
    checkpoint = RandomCheckpoint(kind, CONFIG)
    model = build_model(checkpoint.config)
    found = matched(weights_in(model.weights), checkpoint.infos(), "")
    predicted = footprint(model, found, policy=policy, cache_type="f16")
    executor = load(checkpoint, model, policy=policy)
    assert predicted.weights == pytest.approx(executor.weights.nbytes, rel=0.02)


@pytest.mark.parametrize("tokens", [1, 300, 1100])
@pytest.mark.parametrize("window", [None, 40])
def test_what_a_row_takes_is_what_was_predicted(tokens: int, window: int | None):
    model = made(changes=windowed(window) if window else None, longest_step=2000)
    model.forward(Step((Row(0, 0, tuple(TOKENS[:tokens]), 0),)))
    assert model.state_nbytes(tokens) == model._slabs.nbytes
    model.release(0)
    assert model._slabs.nbytes == 0


def test_residuals_are_those_of_the_layers_and_padding_is_seen_by_nobody(model: MLXExecutor):
    tokens = TOKENS[:20]
    bare = model.residuals(tokens, (0, 2, 3))
    padded = model.residuals([*tokens, *[9] * 12], (0, 2, 3), visible=20)
    assert bare.shape == (3, 20, 256)
    assert_close(padded[:, :20], bare, 1e-5)
    assert not np.allclose(padded[1:, 20:], model.residuals([*tokens, *[9] * 12], (2, 3))[:, 20:], atol=1e-3)
