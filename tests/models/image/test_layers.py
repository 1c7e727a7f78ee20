"""The layers that the transformers share, by arithmetic that can be followed by hand."""

import mlx.core as mx
import numpy as np
import pytest

from models.image.host_layers import rms_norm
from models.image.layers import (
    attend,
    axis_rotations,
    grid_positions,
    layer_norm,
    rotate,
    silu,
    swiglu,
    timestep_embedding,
)


def normal(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_times_embedding_is_cosines_then_sines_of_ever_slower_waves():
    found = np.array(timestep_embedding(3.0, 4))
    np.testing.assert_allclose(found, [[np.cos(3.0), np.cos(0.03), np.sin(3.0), np.sin(0.03)]], rtol=1e-6)


def test_the_last_axis_of_a_grid_is_the_fastest():
    found = grid_positions(range(5, 6), range(2), range(3))
    assert found.tolist() == [[5, 0, 0], [5, 0, 1], [5, 0, 2], [5, 1, 0], [5, 1, 1], [5, 1, 2]]


def test_each_axis_turns_its_own_pairs():
    found = axis_rotations(np.array([[2, 0, 7], [0, 3, 0]]), (4, 2, 2), 100.0)
    angles = [[2.0, 0.2, 0.0, 7.0], [0.0, 0.0, 3.0, 0.0]]
    np.testing.assert_allclose(found, np.exp(1j * np.array(angles)), atol=1e-6)
    assert found.dtype == np.complex64


def test_a_quarter_turn_takes_each_pair_to_its_left():
    x = mx.array([[[1.0, 2.0, 3.0, 4.0]]])
    turned = rotate(x, mx.array(np.full((1, 1, 2), 1j, np.complex64)))
    np.testing.assert_allclose(np.array(turned), [[[-2.0, 1.0, -4.0, 3.0]]])


def test_turning_keeps_the_type():
    x = mx.ones((2, 3, 4), dtype=mx.bfloat16)
    assert rotate(x, mx.array(np.ones((2, 1, 2), np.complex64))).dtype == mx.bfloat16


def test_attention_is_a_mean_of_values_weighted_by_likeness():
    queries, keys, values = normal(5, 2, 4, seed=1), normal(5, 2, 4, seed=2), normal(5, 2, 4, seed=3)
    scores = np.exp(np.einsum("ihd,jhd->hij", queries, keys) / 2.0)
    weights = scores / scores.sum(axis=-1, keepdims=True)
    expected = np.einsum("hij,jhd->ihd", weights, values).reshape(5, 8)
    found = attend(*(mx.array(each) for each in (queries, keys, values)))
    np.testing.assert_allclose(np.array(found), expected, atol=1e-6)


def test_norms_make_mean_squares_of_one():
    x = normal(3, 64) * 5.0 + 2.0
    np.testing.assert_allclose(np.array(layer_norm(mx.array(x))).var(axis=1), 1.0, atol=1e-4)
    np.testing.assert_allclose(np.array(layer_norm(mx.array(x))).mean(axis=1), 0.0, atol=1e-5)
    weight = normal(64)
    out = x.copy()
    rms_norm(out, weight, 1e-5, out)
    expected = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [-100.0, -1.0, 0.0, 2.0, 100.0])
def test_silu_is_x_times_its_sigmoid(value: float):
    expected = value / (1.0 + np.exp(-value))
    assert silu(mx.array(value)).item() == pytest.approx(expected, abs=1e-6)
    assert swiglu(mx.array(value), mx.array(3.0)).item() == pytest.approx(3.0 * expected, abs=1e-6)
