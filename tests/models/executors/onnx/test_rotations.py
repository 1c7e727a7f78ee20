"""The CPU's tables of rotations, at the positions that rows reach."""

import numpy as np
import pytest

from models.executors.onnx.memory import Rotations
from models.ops.rope import RopeConfig, read_rope

YARN = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}


def expected(rope: RopeConfig, positions: range) -> np.ndarray:
    angles = np.array(positions)[:, None] * rope.frequencies().astype(np.float64)
    return rope.magnitude * np.exp(1j * angles)


@pytest.mark.parametrize("rope", [RopeConfig(8, 10000.0), read_rope(YARN, dims=32)], ids=["plain", "yarn"])
@pytest.mark.parametrize("reach", [1, 255, 256, 257, 5000])
def test_positions_turn_by_their_frequencies_times_the_magnitude(rope: RopeConfig, reach: int):
    table = Rotations(rope, 5000)
    table.reach(reach)
    found = table.cos[:reach] + 1j * table.sin[:reach]
    np.testing.assert_allclose(found, expected(rope, range(reach)), atol=5e-4)


def test_a_table_that_grows_leaves_early_positions_alone():
    table = Rotations(RopeConfig(8, 10000.0), 4096)
    table.reach(3)
    before = table.cos[:256].copy()
    table.reach(1000)
    np.testing.assert_array_equal(table.cos[:256], before)
    assert table.cos[999].any()


def test_nothing_is_filled_beyond_the_table():
    table = Rotations(RopeConfig(8, 10000.0), 300)
    table.reach(5000)
    np.testing.assert_allclose(table.sin[299], np.sin(299 * RopeConfig(8, 10000.0).frequencies()), atol=1e-4)
