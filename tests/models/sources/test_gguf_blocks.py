import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from models.quantization import Blocks, dequantize, packed_nbytes
from models.sources.gguf_blocks import REPACKED, as_packed

ROWS = np.random.default_rng(3).normal(size=(24, 160)).astype(np.float32)


@pytest.mark.parametrize("kind", sorted(REPACKED))
def test_repacked_blocks_hold_exactly_what_ggml_dequantises(kind: Kind):
    blocks = quants.quantize(ROWS, kind)
    packed = as_packed(Blocks(blocks, kind, ROWS.shape))
    assert packed is not None
    assert packed.biases is not None
    assert packed.spec == REPACKED[kind]
    reference = quants.dequantize(blocks, kind)
    assert packed.shape == ROWS.shape
    # One rounding of float32 apart: theirs is d * (q - 8), ours d * q - 8 d.
    assert np.abs(dequantize(packed) - reference).max() <= 2**-22 * np.abs(reference).max()
    nbytes = packed.weight.nbytes + packed.scales.nbytes + packed.biases.nbytes
    assert packed_nbytes(REPACKED[kind], ROWS.shape, 2) == nbytes


@pytest.mark.parametrize("kind", sorted(REPACKED))
def test_the_codes_themselves_are_carried_over(kind: Kind):
    # Scale 1 makes every value a small whole number, so there is no rounding to hide behind.
    block_bytes = quants.quantize(ROWS, kind).shape[1] // 5
    blocks = np.random.default_rng(5).integers(0, 256, (7, 3, block_bytes), np.uint8)
    blocks[..., 0:2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    if kind == Kind.Q4_1:
        blocks[..., 2:4] = np.frombuffer(np.float16(-3).tobytes(), np.uint8)
    packed = as_packed(Blocks(blocks.reshape(7, -1), kind, (7, 96)))
    assert packed is not None
    assert packed.shape == (7, 96)
    assert np.array_equal(dequantize(packed), quants.dequantize(blocks.reshape(7, -1), kind))


def test_a_zero_point_that_float16_cannot_hold_is_not_repacked():
    blocks = quants.quantize(np.full((1, 32), 1e5, np.float32), Kind.Q8_0)
    assert as_packed(Blocks(blocks, Kind.Q8_0, (1, 32))) is None


@pytest.mark.parametrize("kind", [Kind.Q5_0, Kind.Q5_1])
def test_other_formats_are_not_repacked(kind: Kind):
    assert as_packed(Blocks(quants.quantize(ROWS, kind), kind, ROWS.shape)) is None


def test_the_matrices_of_a_stack_stay_apart():
    packed = as_packed(Blocks(quants.quantize(ROWS, Kind.Q4_0), Kind.Q4_0, (3, 8, 160)))
    assert packed is not None
    assert packed.shape == (3, 8, 160)
    assert packed.scales.shape == (3, 8, 5)
