"""Packed caches: near what was put in, the same however it was cut, and as small as promised."""

import mlx.core as mx
import numpy as np
import pytest

from models.cache import CacheType, LayerCache, cache_nbytes, check_cache_type, layer_cache
from models.cache.kv import BLOCK_TOKENS
from models.errors import QuantizationError

KV_HEADS, HEAD_DIM = 2, 64
QUANTISED: tuple[CacheType, ...] = ("q8_0", "q4_0")
STEPS = {"q8_0": 255, "q4_0": 15}


@pytest.fixture(params=QUANTISED)
def cache_type(request: pytest.FixtureRequest) -> CacheType:
    return request.param


def rows(tokens: int, *, seed: int = 3) -> tuple[mx.array, mx.array]:
    """Keys and values, with an offset and an outlier as real keys have them."""
    generator = np.random.default_rng(seed)
    drawn = generator.normal(size=(2, 1, KV_HEADS, tokens, HEAD_DIM)).astype(np.float32)
    drawn[0, ..., 5] += 20
    return mx.array(drawn[0]), mx.array(drawn[1])


def feed(cache: LayerCache, keys: mx.array, values: mx.array, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    found: tuple[mx.array, mx.array] | None = None
    for length in lengths:
        own = slice(cache.offset, cache.offset + length)
        found = cache.update(keys[:, :, own], values[:, :, own])
    assert found is not None
    return np.array(found[0]), np.array(found[1])


def predicted(cache_type: CacheType, tokens: int, window: int | None = None) -> int:
    return cache_nbytes(tokens, window=window, kv_heads=KV_HEADS, head_dim=HEAD_DIM, itemsize=4, cache_type=cache_type)


def test_no_value_is_off_by_more_than_one_step_of_its_group(cache_type: CacheType):
    keys, values = rows(50)
    for given, found in zip((keys, values), feed(layer_cache(cache_type, None), keys, values, [50]), strict=True):
        groups = np.array(given).reshape(-1, 32)
        steps = np.ptp(groups, axis=-1, keepdims=True) / STEPS[cache_type]
        assert (np.abs(found.reshape(-1, 32) - groups) <= 1.01 * steps).all()


def test_what_a_query_sees_does_not_depend_on_how_its_row_was_cut(cache_type: CacheType):
    keys, values = rows(BLOCK_TOKENS + 10)
    whole = feed(layer_cache(cache_type, None), keys, values, [BLOCK_TOKENS + 10])
    cut = feed(layer_cache(cache_type, None), keys, values, [100, 1, 1, BLOCK_TOKENS - 100, 7, 1])
    np.testing.assert_array_equal(whole, cut)


def test_a_window_drops_what_no_query_can_see(cache_type: CacheType):
    keys, values = rows(3 * BLOCK_TOKENS)
    whole = feed(layer_cache(cache_type, None), keys, values, [3 * BLOCK_TOKENS])
    cache = layer_cache(cache_type, 8)
    lengths = [BLOCK_TOKENS, *[1] * BLOCK_TOKENS, BLOCK_TOKENS - 1, 1]
    found = feed(cache, keys, values, lengths)
    np.testing.assert_array_equal(found, [array[:, :, -8:] for array in whole])
    assert cache.nbytes <= predicted(cache_type, 3 * BLOCK_TOKENS, window=8)
    assert (cache.offset, cache.first) == (3 * BLOCK_TOKENS, 3 * BLOCK_TOKENS - 8)


def test_a_snapshot_and_its_original_go_separate_ways(cache_type: CacheType):
    left, right = rows(40, seed=1), rows(40, seed=2)
    cache = layer_cache(cache_type, None)
    feed(cache, *left, [20])
    kept = cache.snapshot()
    first, second = feed(cache, *left, [5, 1]), feed(kept, *right, [5, 1])
    np.testing.assert_array_equal(first, feed(layer_cache(cache_type, None), *left, [26]))
    np.testing.assert_array_equal(second[0][:, :, :20], first[0][:, :, :20])
    assert not np.array_equal(second[0][:, :, 20:], first[0][:, :, 20:])


def test_segments_stay_packed_and_put_together_again_lose_nothing(cache_type: CacheType):
    keys, values = rows(60)
    cache = layer_cache(cache_type, None)
    expected = feed(cache, keys, values, [50])
    segments = [cache.segment(0, 30), cache.segment(30, 50).part(0, 10), cache.segment(40, 50)]
    plain = 2 * KV_HEADS * 50 * HEAD_DIM * 4
    assert sum(segment.nbytes for segment in segments) < plain / {"q8_0": 3, "q4_0": 5}[cache_type]
    restored = layer_cache(cache_type, None)
    restored.restore(segments)
    assert restored.offset == 50
    found = feed(restored, keys, values, [10])
    np.testing.assert_array_equal(found, feed(cache, keys, values, [10]))
    np.testing.assert_array_equal([array[:, :, :50] for array in found], expected)


def test_trimmed_tokens_are_as_if_they_had_never_been(cache_type: CacheType):
    keys, values = rows(40)
    cache = layer_cache(cache_type, None)
    feed(cache, keys, values, [20, 10])
    cache.trim(7)
    assert cache.offset == 23
    np.testing.assert_array_equal(
        feed(cache, keys, values, [5]), feed(layer_cache(cache_type, None), keys, values, [28])
    )


@pytest.mark.parametrize("tokens", [1, BLOCK_TOKENS, BLOCK_TOKENS + 1])
def test_the_prediction_is_what_is_held(cache_type: CacheType, tokens: int):
    cache = layer_cache(cache_type, None)
    feed(cache, *rows(tokens), [tokens])
    assert cache.nbytes == predicted(cache_type, tokens)
    assert cache.nbytes < predicted("f16", tokens) / {"q8_0": 3, "q4_0": 5}[cache_type]


def test_half_precision_comes_back_as_half_precision(cache_type: CacheType):
    keys, values = (array.astype(mx.bfloat16) for array in rows(10))
    found, _ = layer_cache(cache_type, None).update(keys, values)
    assert found.dtype == mx.bfloat16


@pytest.mark.parametrize("head_dim", [16, 80])
def test_heads_that_are_no_whole_groups_are_refused_by_their_size(cache_type: CacheType, head_dim: int):
    with pytest.raises(QuantizationError, match=rf"{cache_type} .* 32 .* {head_dim}; choose the cache type f16"):
        check_cache_type(cache_type, head_dim)
    check_cache_type("f16", head_dim)
    check_cache_type(cache_type, 128)
