from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from models.cache.kv import BLOCK_TOKENS
from models.errors import CheckpointError
from models.llm.base import Row
from models.nn.decoder import Decoder, causal_mask, read_decoder_config, read_windows

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def looks(rows: str) -> np.ndarray:
    """A mask drawn with `x` where a query looks."""
    return np.array([[char == "x" for char in row] for row in rows.split()])


@pytest.mark.parametrize(
    ("length", "visible", "window", "expected"),
    [
        (1, 1, None, "x"),
        (3, 3, None, "x.. xx. xxx"),
        (2, 4, None, "xxx. xxxx"),
        (3, 3, 1, "x.. .x. ..x"),
        (4, 4, 2, "x... xx.. .xx. ..xx"),
        (4, 4, 3, "x... xx.. xxx. .xxx"),
        (4, 4, 4, "x... xx.. xxx. xxxx"),
        (4, 4, 5, "x... xx.. xxx. xxxx"),
        (3, 5, 3, "xxx.. .xxx. ..xxx"),
        (2, 4, 3, "xxx. .xxx"),
        (1, 3, 3, "xxx"),
    ],
)
def test_a_query_sees_itself_and_the_window_before_it(length: int, visible: int, window: int | None, expected: str):
    mask = causal_mask(length, visible, window)
    assert mask.dtype == mx.bool_
    np.testing.assert_array_equal(np.array(mask), looks(expected))


def test_sizes_that_are_not_said_follow_from_others():
    config = read_decoder_config(SIZES)
    assert (config.num_kv_heads, config.head_dim, config.rope.dims) == (4, 4, 4)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "rope_scaling", "rms_norm_eps"])
def test_null_is_as_good_as_absent(key: str):
    assert read_decoder_config(SIZES | {key: None}) == read_decoder_config(SIZES)


def test_an_explicit_head_dim_goes_before_the_derived_one():
    config = read_decoder_config(SIZES | {"head_dim": 10})
    assert (config.head_dim, config.rope.dims) == (10, 10)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": 16.5}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read_decoder_config(SIZES | change)


@pytest.mark.parametrize(
    ("change", "first", "expected"),
    [
        ({}, 0, ()),
        ({"sliding_window": None}, 0, ()),
        ({"sliding_window": 0}, 0, ()),
        ({"sliding_window": 8}, 0, (8, 8, 8)),
        ({"sliding_window": 8}, 2, (None, None, 8)),
        ({"sliding_window": 8}, 3, (None, None, None)),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            3,
            (8, None, 8),
        ),
    ],
)
def test_windows_are_by_kind_of_layer_or_from_a_layer_on(change: dict[str, Any], first: int, expected: tuple[Any, ...]):
    assert read_windows(SIZES | change, first_windowed_layer=first) == expected


@pytest.mark.parametrize(
    "kinds",
    [
        ["full_attention"] * 2,
        ["full_attention"] * 4,
        ["full_attention", "full_attention", "linear_attention"],
        [1, 2, 3],
    ],
)
def test_layer_types_that_fit_no_layer_are_refused(kinds: list[Any]):
    with pytest.raises(CheckpointError, match="layer_types"):
        read_windows(SIZES | {"sliding_window": 8, "layer_types": kinds})


def test_the_prediction_counts_each_layer_by_its_own_window():
    config = read_decoder_config(SIZES | {"num_key_value_heads": 2}, windows=(None, 8, None))
    wide, narrow, same = config.cache_nbytes_per_layer(5 * BLOCK_TOKENS, itemsize=4)
    assert wide == same == 2 * 5 * BLOCK_TOKENS * 2 * 4 * 4
    assert narrow < wide


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_logits_are_float32_and_caches_of_the_weights_kind(dtype: mx.Dtype):
    model = Decoder(read_decoder_config(SIZES | {"num_key_value_heads": 2}))
    model.set_dtype(dtype)
    cache = model.new_cache()
    logits = model.logits(model(mx.array([1, 2, 3]), [Row(3, cache)]))
    assert (logits.dtype, logits.shape) == (mx.float32, (3, 11))
    assert {array.dtype for layer in cache for array in layer.arrays()} == {dtype}
    assert sum(layer.nbytes for layer in cache) == model.cache_nbytes(3)
