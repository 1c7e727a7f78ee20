"""Slabs, segments and windows of the CPU's executor."""

import mmap

import numpy as np
import psutil
import pytest

from models.executors.onnx.memory import Rotations, VirtualArray
from models.executors.onnx.slabs import WINDOW_SLACK, SlabSpec, slab_specs, state_nbytes
from models.executors.onnx.state import Slabs
from models.ops import KV, RopeConfig

FLOAT = np.dtype(np.float32)


def filled(slabs: Slabs, slot: int, tokens: int) -> None:
    """Write each position's number into its place, as a window of that many tokens would lie."""
    for spec in slabs.specs:
        held = spec.held(tokens)
        view = slabs.views(slot, slot + 1)[f"past.{spec.name}"]
        view[0, :, :held] = np.arange(tokens - held, tokens, dtype=np.float32)[None, :, None]


def read(slabs: Slabs, slot: int, tokens: int) -> list[np.ndarray]:
    return [
        slabs.views(slot, slot + 1)[f"past.{spec.name}"][0, 0, : spec.held(tokens), 0].copy() for spec in slabs.specs
    ]


def specs(*windows: int | None) -> list[SlabSpec]:
    return [spec for layer, window in enumerate(windows) for spec in slab_specs(KV(2, 32, 32, window), layer, "f16")]


@pytest.mark.parametrize("tokens", [1, 100, 300, 700])
def test_segments_put_back_are_as_they_were(tokens: int):
    slabs = Slabs(specs(None, 40), slots=3, capacity=1024)
    filled(slabs, 0, tokens)
    begin = slabs.first_held(tokens)
    if begin:
        assert begin == tokens - slabs.specs[-1].held(tokens)
        return
    middle = tokens // 2
    parts = [slabs.segment(0, tokens, a, b) for a, b in ((0, middle), (middle, tokens)) if a < b]
    slabs.restore(2, parts)
    for one, other in zip(read(slabs, 0, tokens), read(slabs, 2, tokens), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_window_restored_from_segments_lies_as_it_would_have_come():
    slabs = Slabs(specs(None, 40), slots=2, capacity=1024)
    parts = []
    for end in (128, 256, 384, 512, 640):
        filled(slabs, 0, end)
        parts.append(slabs.segment(0, end, end - 128, end))
    slabs.restore(1, parts)
    for one, other in zip(read(slabs, 0, 640), read(slabs, 1, 640), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("window", [1, 24, 500])
def test_a_window_stays_whole_and_moves_by_its_slack(window: int):
    spec = specs(window)[0]
    for tokens in range(1, 4 * WINDOW_SLACK + window):
        held, room = spec.held(tokens), spec.room(tokens)
        assert min(tokens, window) <= held <= spec.capacity(10**6)
        assert spec.held(tokens + room) == held + room
        assert spec.held(tokens + room + 1) < held + room + 1


def test_memory_is_taken_where_it_is_written_and_given_back():
    process = psutil.Process()
    before = process.memory_info().rss
    array = VirtualArray((4, 1 << 28), FLOAT)
    assert process.memory_info().rss - before < 8 << 20
    array.array[1, : 16 << 20] = 1
    assert process.memory_info().rss - before > 60 << 20
    array.forget(1)
    assert process.memory_info().rss - before < 16 << 20
    assert array.array[1, :10].sum() == 0


def test_addresses_that_nobody_has_are_a_memory_error():
    with pytest.raises(MemoryError, match="address space"):
        VirtualArray((1 << 50,), FLOAT)


def test_what_a_row_takes_is_counted_in_pages():
    assert state_nbytes(specs(None), 1) == 2 * 2 * mmap.PAGESIZE
    assert state_nbytes(specs(None), 10_000) == pytest.approx(2 * 2 * 32 * 4 * 10_000, rel=0.01)
    assert state_nbytes(specs(100), 10_000) == state_nbytes(specs(100), 1000)


def test_segments_of_other_shapes_are_refused():
    slabs = Slabs(specs(None), slots=1, capacity=64)
    filled(slabs, 0, 10)
    arrays = dict(slabs.segment(0, 10, 0, 10).arrays())
    assert slabs.read(arrays, 10).length == 10
    with pytest.raises(ValueError, match="not those of this model"):
        slabs.read({"k.0": arrays["k.0"]}, 10)
    for length in (9, 11):
        with pytest.raises(ValueError, match=r"its array k\.0"):
            slabs.read(arrays, length)
    with pytest.raises(ValueError, match=r"its array k\.0"):
        slabs.read(arrays | {"k.0": arrays["k.0"].astype(np.float16)}, 10)


def test_rotations_are_filled_as_far_as_rows_reach():
    rope = RopeConfig(32, 10000.0)
    table = Rotations(rope, 4096)
    for reach in (3, 300, 4096):
        table.reach(reach)
        angles = np.arange(reach, dtype=np.float32)[:, None] * rope.frequencies()
        np.testing.assert_allclose(table.cos[:reach], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(table.sin[:reach], np.sin(angles), atol=1e-6)
