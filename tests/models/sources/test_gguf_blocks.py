import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from models.quantization import Packed, dequantize, packed_nbytes
from models.sources.gguf_blocks import REPACKED, repack

ROWS = np.random.default_rng(3).normal(size=(24, 160)).astype(np.float32)


@pytest.mark.parametrize("kind", sorted(REPACKED))
def test_repacked_blocks_hold_exactly_what_ggml_dequantises(kind: Kind):
    blocks = quants.quantize(ROWS, kind)
    rows = repack(blocks, kind)
    assert rows is not None
    packed = Packed(mx.array(rows.weight), mx.array(rows.scales), mx.array(rows.biases), REPACKED[kind])
    reference = quants.dequantize(blocks, kind)
    assert packed.shape == ROWS.shape
    # One rounding of float32 apart: theirs is d * (q - 8), ours d * q - 8 d.
    assert np.abs(np.array(dequantize(packed, mx.float32)) - reference).max() <= 2**-22 * np.abs(reference).max()
    nbytes = rows.weight.nbytes + rows.scales.nbytes + rows.biases.nbytes
    assert packed_nbytes(REPACKED[kind], ROWS.shape, 2) == nbytes


@pytest.mark.parametrize("kind", sorted(REPACKED))
def test_the_codes_themselves_are_carried_over(kind: Kind):
    # Scale 1 makes every value a small whole number, so there is no rounding to hide behind.
    block_bytes = quants.quantize(ROWS, kind).shape[1] // 5
    blocks = np.random.default_rng(5).integers(0, 256, (7, 3, block_bytes), np.uint8)
    blocks[..., 0:2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    if kind == Kind.Q4_1:
        blocks[..., 2:4] = np.frombuffer(np.float16(-3).tobytes(), np.uint8)
    rows = repack(blocks.reshape(7, -1), kind)
    assert rows is not None
    packed = Packed(mx.array(rows.weight), mx.array(rows.scales), mx.array(rows.biases), REPACKED[kind])
    assert np.array_equal(np.array(dequantize(packed, mx.float32)), quants.dequantize(blocks.reshape(7, -1), kind))


def test_a_zero_point_that_float16_cannot_hold_is_not_repacked():
    blocks = quants.quantize(np.full((1, 32), 1e5, np.float32), Kind.Q8_0)
    assert repack(blocks, Kind.Q8_0) is None
