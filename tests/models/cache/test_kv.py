import ctypes
import itertools
from collections.abc import Iterable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from models.cache import CACHE_TYPES, CacheType, KVCache, LayerCache, SeenOnHost, cache_nbytes, layer_cache
from models.cache.kv import BLOCK_TOKENS

KV_HEADS, HEAD_DIM = 2, 3
LONG = 3 * BLOCK_TOKENS + 10
# Chunks that end before, on and behind the ends of blocks.
CHUNKS = {
    "in one": [LONG],
    "one by one over two ends": [BLOCK_TOKENS - 2, 1, 1, 1, 1, BLOCK_TOKENS - 3, 1, 1, 1],
    "just a block": [BLOCK_TOKENS],
    "blocks": [BLOCK_TOKENS, BLOCK_TOKENS, 1],
    "a block and one": [BLOCK_TOKENS + 1, BLOCK_TOKENS - 1, 1],
    "odd": [100, 300, 1, 1, 200, 7],
    "three blocks at once after one token": [1, LONG],
}


def history(tokens: int, *, salt: float = 0.0) -> np.ndarray:
    """Keys that say whose they are: token.head + salt. Shape: (1, H, L, D)."""
    token = np.arange(tokens, dtype=np.float32)[None, None, :, None]
    head = np.arange(KV_HEADS, dtype=np.float32)[None, :, None, None] / 8
    return np.broadcast_to(token + head + np.float32(salt), (1, KV_HEADS, tokens, HEAD_DIM)).copy()


def feed(cache: KVCache, keys: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Update with the next tokens of `keys`; yields the end so far and the keys and values that came back."""
    for length in lengths:
        begin = cache.offset
        part = mx.array(keys[:, :, begin : begin + length])
        found_keys, found_values = cache.update(part, -part)
        yield begin + length, np.array(found_keys), np.array(found_values)


def drain(cache: KVCache, keys: np.ndarray, lengths: Iterable[int]) -> np.ndarray:
    """Feed and return the last keys that came back."""
    *_, (_, found, _) = feed(cache, keys, lengths)
    return found


@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS.keys())
def test_everything_comes_back_in_order_whatever_the_chunks(lengths: list[int]):
    keys = history(sum(lengths))
    cache = KVCache()
    for end, found_keys, found_values in feed(cache, keys, lengths):
        assert cache.offset == end
        np.testing.assert_array_equal(found_keys, keys[:, :, :end])
        np.testing.assert_array_equal(found_values, -keys[:, :, :end])


@pytest.mark.parametrize("window", [1, 2, 8, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS + 5])
@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS.keys())
def test_a_window_returns_what_its_oldest_query_can_see(lengths: list[int], window: int):
    keys = history(sum(lengths))
    cache = KVCache(window)
    previous = 0
    for end, found_keys, found_values in feed(cache, keys, lengths):
        begin = max(0, previous - window + 1)
        np.testing.assert_array_equal(found_keys, keys[:, :, begin:end])
        np.testing.assert_array_equal(found_values, -keys[:, :, begin:end])
        assert cache.offset == end
        previous = end


@pytest.mark.parametrize("window", [None, 8, BLOCK_TOKENS, 10 * BLOCK_TOKENS])
def test_a_cache_never_holds_more_than_predicted(window: int | None):
    lengths = [100, 100, 100, *[1] * (BLOCK_TOKENS + 10), 128, 128, 128]
    keys = history(sum(lengths))
    cache = KVCache(window)
    for end, _, _ in feed(cache, keys, lengths):
        predicted = cache_nbytes(end, window=window, kv_heads=KV_HEADS, head_dim=HEAD_DIM, itemsize=4)
        assert cache.nbytes <= predicted, f"after {end} tokens"


def test_the_prediction_is_not_far_above_what_is_held():
    for tokens in (1, BLOCK_TOKENS, BLOCK_TOKENS + 1, LONG):
        cache = KVCache()
        drain(cache, history(tokens), [tokens])
        predicted = cache_nbytes(tokens, window=None, kv_heads=KV_HEADS, head_dim=HEAD_DIM, itemsize=4)
        needed = 2 * tokens * KV_HEADS * HEAD_DIM * 4
        assert needed <= cache.nbytes == predicted < needed + 2 * BLOCK_TOKENS * KV_HEADS * HEAD_DIM * 4


def test_a_window_bounds_the_memory_of_a_long_row():
    cache = KVCache(8)
    lengths = [50] * 60
    sizes = [cache.nbytes for _ in feed(cache, history(sum(lengths)), lengths)]
    assert max(sizes) <= 2 * 2 * BLOCK_TOKENS * KV_HEADS * HEAD_DIM * 4


def test_an_empty_cache_holds_nothing():
    cache = KVCache()
    assert (cache.offset, cache.nbytes, cache.arrays()) == (0, 0, [])


def test_the_arrays_to_evaluate_are_those_that_are_held():
    cache = KVCache()
    drain(cache, history(5), [5])
    assert sum(array.nbytes for array in cache.arrays()) == cache.nbytes > 0


def test_the_dtype_is_that_of_the_keys():
    cache = KVCache()
    keys = mx.ones((1, KV_HEADS, BLOCK_TOKENS, HEAD_DIM), dtype=mx.bfloat16)
    cache.update(keys, keys)
    found, _ = cache.update(keys[:, :, :1], keys[:, :, :1])
    assert found.dtype == mx.bfloat16
    assert cache.nbytes == cache_nbytes(BLOCK_TOKENS + 1, window=None, kv_heads=KV_HEADS, head_dim=HEAD_DIM, itemsize=2)


@pytest.mark.parametrize("window", [None, 8, BLOCK_TOKENS])
@pytest.mark.parametrize("length", [1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1])
@pytest.mark.parametrize("original_first", [True, False])
def test_a_snapshot_and_its_original_go_separate_ways(window: int | None, length: int, original_first: bool):
    total = length + BLOCK_TOKENS + 5
    left, right = history(total), history(total, salt=0.5)
    right[:, :, :length] = left[:, :, :length]
    cache = KVCache(window)
    drain(cache, left, [length])
    kept = cache.snapshot()
    assert kept.offset == length

    branches = [(cache, left), (kept, right)]
    for branch, keys in branches if original_first else branches[::-1]:
        drain(branch, keys, [1, 2])
    lengths = [*itertools.repeat(1, 3), total - length - 6]
    for branch, keys in branches:
        found = drain(branch, keys, lengths)
        np.testing.assert_array_equal(found, keys[:, :, total - found.shape[2] :])


def test_a_snapshot_of_an_empty_cache_is_empty_and_stays_so():
    cache = KVCache(8)
    kept = cache.snapshot()
    drain(cache, history(20), [20])
    assert (kept.offset, kept.nbytes, kept.window) == (0, 0, 8)
    np.testing.assert_array_equal(drain(kept, history(3), [3]), history(3))


def test_one_snapshot_serves_many_times():
    keys = history(40)
    cache = KVCache()
    drain(cache, keys, [10])
    kept = cache.snapshot()
    for salt in (0.0, 0.25, 0.5):
        branch = kept.snapshot()
        other = history(40, salt=salt)
        found = drain(branch, other, [30])
        np.testing.assert_array_equal(found[:, :, :10], keys[:, :, :10])
        np.testing.assert_array_equal(found[:, :, 10:], other[:, :, 10:])


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("window", [None, 5, 300])
def test_tokens_appended_on_the_host_are_held_as_by_the_graph(window: int | None, cache_type: CacheType):
    """With growth, windows, steps of the other kind in between, and snapshots that must not see each other's tokens."""
    rng = np.random.default_rng(3)
    tokens = rng.normal(size=(2, 620, KV_HEADS, 64)).astype(np.float32)

    # Multiplying and adding may be one operation to MLX.
    tolerance = 0 if cache_type == "f16" else 1e-6

    def graph(cache: LayerCache, begin: int, end: int) -> list[np.ndarray]:
        parts = (mx.array(part[None, begin:end].swapaxes(1, 2)) for part in tokens)
        return [np.array(seen)[0] for seen in cache.update(*parts)]

    mixed, expected = layer_cache(cache_type, window), layer_cache(cache_type, window)
    assert isinstance(mixed, KVCache)
    for cache in (mixed, expected):
        graph(cache, 0, 250)
    kept = mixed.snapshot()
    for place in range(250, 620):
        if place % 100 == 99:
            seen = graph(mixed, place, place + 1)
        else:
            new = mixed.held_on_host(*(part[place, :, None] for part in tokens))
            on_host = mixed.append_on_host(*new)
            seen = [_at(begin, on_host) for begin in (on_host.keys, on_host.values)]
        for got, right in zip(seen, graph(expected, place, place + 1), strict=True):
            np.testing.assert_allclose(got, right, rtol=0, atol=tolerance)
    assert mixed.first == expected.first
    assert kept.offset == 250
    other = layer_cache(cache_type, window)
    for begin, end in ((0, 250), (400, 401)):
        right, _ = graph(other, begin, end)
    keys, _ = graph(kept, 400, 401)
    np.testing.assert_array_equal(keys, right)


def test_a_snapshot_of_a_cache_whose_memory_is_lent_stays_as_it_is():
    cache = KVCache()
    cache.append_on_host(
        np.full((KV_HEADS, 1, HEAD_DIM), 1, np.float32), np.full((KV_HEADS, 1, HEAD_DIM), 2, np.float32)
    )
    kept = cache.snapshot()
    for each, value in ((kept, 5), (cache, 7)):
        each.append_on_host(*[np.full((KV_HEADS, 1, HEAD_DIM), value, np.float32)] * 2)
    for each, value in ((kept, 5), (cache, 7)):
        assert [float(array[0, 0, 1, 0]) for array in each.segment(0, 2).arrays] == [value, value]


def _at(begin: int, seen: SeenOnHost) -> np.ndarray:
    """A copy of the keys or values of all heads that lie there."""
    heads = [(ctypes.c_float * (seen.tokens * 64)).from_address(begin + head * seen.stride) for head in range(KV_HEADS)]
    return np.array(heads).reshape(KV_HEADS, seen.tokens, 64)
