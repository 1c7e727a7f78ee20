"""Layers on numpy arrays against the same mathematics written down plainly, alone and shared among threads."""

from collections.abc import Iterator

import numpy as np
import pytest

from models.image import host_layers
from models.image.gemm import Crew, host_gemm
from models.image.host_layers import Product

RANDOM = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.fixture(params=[1, 3])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    gemm = host_gemm()
    if gemm is None:
        pytest.skip("no fast BLAS here")
    crew = Crew(gemm)
    threads, crew.size = crew.size, request.param
    with crew:
        yield crew
    gemm.set_threads(threads)


def softmax_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, heads: int) -> np.ndarray:
    q, k, v = (x.astype(np.float64).reshape(len(x), heads, -1).swapaxes(0, 1) for x in (queries, keys, values))
    scores = q @ k.swapaxes(1, 2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v).swapaxes(0, 1).reshape(len(queries), -1)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("queries_at_once", [7, 384])
def test_attention_is_softmax_whatever_the_size_of_scores_and_parts(crew, monkeypatch, spread, queries_at_once):
    monkeypatch.setattr(host_layers, "QUERIES", queries_at_once)
    wide = normal(70, 3 * 24)
    queries, keys, values = wide[:, :24] * spread, wide[:, 24:48], wide[:, 48:]
    expected = softmax_attention(queries[5:60], keys, values, heads=3)
    bound = max(
        float(np.abs(queries[:, part] @ keys[:, part].T).max()) for part in (slice(8 * n, 8 * n + 8) for n in range(3))
    )
    assert (bound > host_layers.SAFE_SCORE) == (spread > 1)
    mine = queries[5:60]
    host_layers.attend(crew, mine, keys, values, 3, bound=bound)
    # Scores of hundreds have an error of their own.
    np.testing.assert_allclose(mine, expected, atol=2e-5 * spread)


def test_no_score_exceeds_the_bound():
    query_norm, key_norm = normal(16), normal(16)
    aligned = np.zeros((1, 1, 16), np.float32)
    aligned[..., np.abs(query_norm * key_norm).argmax()] = 3.0
    for heads in (normal(50, 1, 16), aligned):
        queries, keys = heads.copy(), heads.copy()
        host_layers.head_norm(queries, query_norm, 1e-6)
        host_layers.head_norm(keys, key_norm, 1e-6)
        assert np.abs(queries[:, 0] @ keys[:, 0].T).max() <= host_layers.score_bound(query_norm, key_norm)


def test_products_of_rows_that_lie_apart_are_added_up(crew):
    wide, out = normal(9, 40), normal(9, 50)
    first, second = normal(37, 12), normal(37, 8)
    target = out[:, 5:42]
    host_layers.multiply(crew, [Product(wide[:, :12], first, target, more=(wide[:, 20:28], second))])
    np.testing.assert_allclose(target, wide[:, :12] @ first.T + wide[:, 20:28] @ second.T, atol=1e-5)


def test_a_layer_norm_is_scaled_and_shifted_and_leaves_its_input():
    x, scale, shift = normal(6, 20) * 3 + 2, normal(20), normal(20)
    before, out = x.copy(), np.empty_like(x)
    host_layers.layer_norm(x, scale, shift, 1e-6, out)
    centred = x - x.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out, centred / x.std(axis=1, keepdims=True) * scale + shift, atol=1e-5)
    np.testing.assert_array_equal(x, before)


def test_pairs_are_turned_in_every_head():
    wide = normal(5, 40)
    x, angles = wide[:, 8:32], RANDOM.uniform(0, 6, (5, 1, 4))
    pairs = x.astype(np.float64).view(np.float64).reshape(5, 3, 4, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    host_layers.turn(x, np.exp(1j * angles).astype(np.complex64))
    ours = x.reshape(5, 3, 4, 2)
    np.testing.assert_allclose(ours[..., 0] + 1j * ours[..., 1], turned, atol=1e-5)


def test_swiglu_survives_large_gates():
    gate, up = np.float32([[-200.0, -3.0, 0.0, 3.0, 200.0]]), normal(1, 5)
    expected = gate / (1 + np.exp(-np.clip(gate.astype(np.float64), -80, 80))) * up
    host_layers.swiglu(gate, up)
    np.testing.assert_allclose(gate, expected, atol=1e-5)
