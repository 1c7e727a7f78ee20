"""A cache in 8 and 4 bits: rounded as written down here in numpy, near the plain one, and the same when put back."""

from itertools import pairwise

import numpy as np
import pytest

from models.arch import build_model
from models.executors.base import Row, Step
from models.executors.onnx import OnnxExecutor, OnnxOptions, load
from tests.models.executors.checkpoints import CONFIG, RandomCheckpoint

TOKENS = tuple(np.random.default_rng(4).integers(0, 320, 90).tolist())
BITS = {"q8_0": 8, "q4_0": 4}
BOUNDS = {"q8_0": 0.02, "q4_0": 0.3}
HEADS, DIM, GROUPS = 2, 64, 2


def executor(cache_type: str) -> OnnxExecutor:
    """Heads of two groups of values, weights that are not rounded."""
    checkpoint = RandomCheckpoint("F32", {**CONFIG, "head_dim": DIM})
    model = build_model(checkpoint.config)
    options = OnnxOptions(slots=3, capacity=256, threads=2, cache_type=cache_type, drafts=True)
    return OnnxExecutor(load(checkpoint, model, options), model.config.vocab_size)


def read(run_by: OnnxExecutor, slot: int, begin: int, end: int) -> np.ndarray:
    """The logits of a row's tokens [begin, end)."""
    found = run_by.forward(Step((Row(slot, begin, TOKENS[begin:end], end - begin),)))
    assert found is not None
    return found.read().copy()


def held(run_by: OnnxExecutor, tokens: int) -> dict[str, np.ndarray]:
    return dict(run_by.segment(0, tokens, 0, tokens).arrays())


@pytest.fixture(scope="module")
def plain() -> OnnxExecutor:
    return executor("f16")


@pytest.fixture(scope="module", params=BITS)
def cache_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def rounded(cache_type: str) -> OnnxExecutor:
    return executor(cache_type)


def in_numpy(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and offsets of groups of 32. Shapes: (heads, T, d); each (heads, T, any)."""
    grouped = values.reshape(*values.shape[:-1], GROUPS, 32)
    offsets = grouped.min(axis=-1)
    steps = (grouped.max(axis=-1) - offsets) * np.float32(1 / (2**bits - 1))
    scales = np.maximum(steps, np.float32(1e-30))
    codes = np.rint((grouped - offsets[..., None]) / scales[..., None]).astype(np.uint8).reshape(values.shape)
    return (codes if bits == 8 else codes[..., ::2] + 16 * codes[..., 1::2]), scales, offsets


def test_values_are_rounded_as_by_numpy_to_the_bit(plain: OnnxExecutor, rounded: OnnxExecutor, cache_type: str):
    """Those of the first layer, which no rounding has reached yet."""
    for each in (plain, rounded):
        read(each, 0, 0, 90)
    exact, found = held(plain, 90)["v.0"], held(rounded, 90)
    assert exact.shape == (HEADS, 90, DIM)
    for part, expected in zip(("codes", "scales", "offsets"), in_numpy(exact, BITS[cache_type]), strict=True):
        np.testing.assert_array_equal(found[f"v.0.{part}"], expected, err_msg=part)


def test_keys_are_off_by_half_a_step_of_their_group_at_most(
    plain: OnnxExecutor, rounded: OnnxExecutor, cache_type: str
):
    for each in (plain, rounded):
        read(each, 0, 0, 90)
    exact, found = held(plain, 90)["k.0"], held(rounded, 90)
    codes, scales, offsets = (found[f"k.0.{part}"] for part in ("codes", "scales", "offsets"))
    if BITS[cache_type] == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(exact.shape)
    grouped = (*scales.shape, 32)
    widened = codes.reshape(grouped).astype(np.float32) * scales[..., None] + offsets[..., None]
    assert (np.abs(widened - exact.reshape(grouped)) <= 0.501 * scales[..., None]).all()


def test_logits_are_near_those_of_the_plain_cache(plain: OnnxExecutor, rounded: OnnxExecutor, cache_type: str):
    exact = read(plain, 0, 0, 90)
    moved = np.abs(read(rounded, 0, 0, 90) - exact).mean()
    assert 0 < moved < BOUNDS[cache_type] * exact.std()


def test_a_row_says_the_same_however_it_was_cut(rounded: OnnxExecutor):
    whole = read(rounded, 0, 0, 90)
    bounds = [0, 1, 2, 33, 50, 51, 90]
    pieces = [read(rounded, 0, a, b) for a, b in pairwise(bounds)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_tokens_that_are_taken_back_are_as_if_they_had_never_been(rounded: OnnxExecutor):
    expected = read(rounded, 0, 0, 90)[60:]
    read(rounded, 0, 0, 60)
    rounded.forward(Step((Row(0, 60, (9, 8, 7, 6), 4),)))
    np.testing.assert_array_equal(read(rounded, 0, 60, 90), expected)


def test_segments_put_into_another_slot_lose_nothing(rounded: OnnxExecutor):
    expected = read(rounded, 0, 0, 90)[70:]
    whole = rounded.segment(0, 90, 0, 70)
    segments = [whole.part(0, 30), rounded.segment(0, 90, 30, 60), whole.part(60, 70)]
    rounded.restore(2, segments)
    np.testing.assert_array_equal(read(rounded, 2, 70, 90), expected)


def test_segments_are_small(plain: OnnxExecutor, rounded: OnnxExecutor, cache_type: str):
    for each in (plain, rounded):
        read(each, 0, 0, 90)
    sizes = [each.segment(0, 90, 0, 90).nbytes for each in (plain, rounded)]
    assert sizes[1] < sizes[0] / {"q8_0": 3, "q4_0": 5}[cache_type]
    assert rounded.state_nbytes(200) < plain.state_nbytes(200)


def test_a_segment_that_went_through_a_file_is_the_segment(rounded: OnnxExecutor):
    expected = read(rounded, 0, 0, 90)[70:]
    segment = rounded.segment(0, 90, 0, 70)
    read_back = rounded.read_segment(
        {name: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for name, array in segment.arrays()}, 70
    )
    assert read_back.length == 70
    rounded.restore(1, [read_back])
    np.testing.assert_array_equal(read(rounded, 1, 70, 90), expected)


def test_a_segment_of_another_kind_of_cache_is_refused(plain: OnnxExecutor, rounded: OnnxExecutor):
    read(plain, 0, 0, 90)
    with pytest.raises(ValueError, match="not those of this model"):
        rounded.read_segment(held(plain, 90), 90)
