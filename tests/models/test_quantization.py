import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from models.errors import QuantizationError
from models.quantization import (
    Blocks,
    Packed,
    QuantizationSpec,
    dequantize,
    fitted_spec,
    keeps_quantized,
    logical_shape,
    packed_nbytes,
    spec_of_quant_type,
    spec_of_settings,
)
from models.to_mlx import PackedArrays, dequantized, packed_from_mlx, packed_to_mlx

SPECS = [
    QuantizationSpec("affine", 4, 32),
    QuantizationSpec("affine", 8, 64),
    QuantizationSpec("affine", 2, 32),
    QuantizationSpec("affine", 3, 128),
    QuantizationSpec("affine", 5, 32),
    QuantizationSpec("affine", 6, 64),
    QuantizationSpec("nvfp4", 4, 16),
    QuantizationSpec("mxfp4", 4, 32),
    QuantizationSpec("mxfp8", 8, 32),
]


def pack(dense: mx.array, spec: QuantizationSpec) -> Packed:
    weight, scales, *biases = mx.quantize(dense, spec.group_size, spec.bits, spec.mode)
    return packed_from_mlx(PackedArrays(weight, scales, biases[0] if biases else None, spec))


@pytest.mark.parametrize("spec", SPECS)
def test_every_mode_comes_back_exactly_as_mlx_itself_makes_it(spec: QuantizationSpec):
    dense = mx.array(np.random.default_rng(0).normal(size=(8, 256)), mx.float32)
    packed = pack(dense, spec)
    back = dequantize(packed)
    assert packed.shape == back.shape == dense.shape
    assert back.dtype == np.float32
    arrays = packed_to_mlx(packed)
    mlx = mx.dequantize(
        arrays.weight, arrays.scales, arrays.biases, spec.group_size, spec.bits, spec.mode, dtype=mx.float32
    )
    assert np.array_equal(back, np.array(mlx))
    assert np.abs(back - np.array(dense)).max() < (0.8 if spec.bits > 2 else 1.5)
    nbytes = sum(array.nbytes for array in (packed.weight, packed.scales, packed.biases) if array is not None)
    assert packed_nbytes(spec, dense.shape, 4) == nbytes


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.mode == "affine"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_bits_of_any_type_of_scales_are_what_mlx_makes_of_them(spec: QuantizationSpec, dtype: type):
    random = np.random.default_rng(4)
    weight = random.integers(0, 2**32, (2, 3, 256 * spec.bits // 32), np.uint32)
    scales, biases = (random.normal(size=(2, 3, 256 // spec.group_size)).astype(dtype) for _ in range(2))
    packed = Packed(weight, scales, biases, spec)
    assert packed.shape == (2, 3, 256)
    assert np.array_equal(dequantize(packed), np.array(dequantized(packed_to_mlx(packed), mx.float32)))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.mode != "affine"])
def test_every_scale_of_eight_bits_is_what_mlx_makes_of_it(spec: QuantizationSpec):
    weight = np.random.default_rng(5).integers(0, 2**32, (256, spec.group_size * spec.bits // 32), np.uint32)
    packed = Packed(weight, np.arange(256, dtype=np.uint8)[:, None], None, spec)
    mlx = np.array(dequantized(packed_to_mlx(packed), mx.float32))
    assert np.array_equal(dequantize(packed), mlx, equal_nan=True)


def test_half_precision_scales_lose_nothing_on_the_way():
    scale, zero = np.float16(0.0123), np.float16(-128 * np.float16(0.0123))
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    packed = Packed(codes.view("<u4"), np.full((8, 1), scale), np.full((8, 1), zero), QuantizationSpec("affine", 8, 32))
    exact = np.float32(scale) * codes.astype(np.float32) + np.float32(zero)
    assert np.allclose(dequantize(packed), exact, atol=1e-7, rtol=0)
    assert np.allclose(dequantized(packed_to_mlx(packed), mx.float32), exact, atol=1e-7, rtol=0)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_global_scale_multiplies_every_weight(shape: tuple[int, ...]):
    packed = pack(mx.ones((2, 32)), QuantizationSpec("nvfp4", 4, 16))
    scaled = Packed(packed.weight, packed.scales, None, packed.spec, np.full(shape, 0.5, np.float32))
    assert np.allclose(dequantize(scaled), 0.5 * dequantize(packed))
    assert np.array_equal(dequantize(scaled), np.array(dequantized(packed_to_mlx(scaled), mx.float32)))


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q5_1])
def test_blocks_are_dequantised_in_their_logical_shape(kind: gguf.GGMLQuantizationType):
    dense = np.random.default_rng(6).normal(size=(6, 64)).astype(np.float32)
    rows = gguf.quantize(dense, kind)
    back = dequantize(Blocks(rows, kind, (2, 3, 64)))
    assert back.dtype == np.float32
    assert np.array_equal(back, gguf.dequantize(rows, kind).reshape(2, 3, 64))


def test_the_dense_matrix_has_the_type_asked_for():
    assert dequantized(packed_to_mlx(pack(mx.ones((2, 64)), SPECS[0])), mx.bfloat16).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({"group_size": 64, "bits": 4}, QuantizationSpec("affine", 4, 64)),
        ({"bits": 8}, QuantizationSpec("affine", 8, 64)),
        ({"group_size": 32, "bits": 6, "mode": "affine"}, QuantizationSpec("affine", 6, 32)),
        ({"mode": "mxfp4"}, QuantizationSpec("mxfp4", 4, 32)),
        ({"mode": "nvfp4", "group_size": 16, "bits": 4}, QuantizationSpec("nvfp4", 4, 16)),
        ({"mode": None, "group_size": 64, "bits": 4, "model.x": False}, QuantizationSpec("affine", 4, 64)),
    ],
)
def test_mlx_settings_are_read_with_its_defaults(settings: dict[str, object], spec: QuantizationSpec):
    assert spec_of_settings(settings) == spec


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "ternary"}, {"bits": 7}, {"bits": "4"}, {"bits": True}, {"group_size": 48}, {"group_size": -32},
        {"mode": 3}, {"mode": "mxfp8", "bits": 4}, {"mode": "nvfp4", "group_size": 32},
    ],
)  # fmt: skip
def test_settings_that_mlx_cannot_run_are_refused(settings: dict[str, object]):
    with pytest.raises(QuantizationError):
        spec_of_settings(settings)


def test_ollamas_types_are_known_in_any_case():
    assert spec_of_quant_type("INT4", 32) == QuantizationSpec("affine", 4, 32)
    assert spec_of_quant_type("int8", None) == QuantizationSpec("affine", 8, 64)
    assert spec_of_quant_type(" NVFP4 ", 64) == QuantizationSpec("nvfp4", 4, 16)
    with pytest.raises(QuantizationError, match="q3_hqq"):
        spec_of_quant_type("q3_hqq", None)


@pytest.mark.parametrize(
    ("declared", "words", "scales", "spec"),
    [
        (QuantizationSpec("affine", 4, 64), 32, 4, QuantizationSpec("affine", 4, 64)),
        # A layer with more bits than its model declares.
        (QuantizationSpec("affine", 4, 64), 64, 4, QuantizationSpec("affine", 8, 64)),
        # A group size that the version which wrote it took as its default.
        (QuantizationSpec("affine", 4, 64), 32, 8, QuantizationSpec("affine", 4, 32)),
        (None, 32, 8, QuantizationSpec("affine", 4, 32)),
        (None, 64, 4, QuantizationSpec("affine", 8, 64)),
        (None, 32, 4, QuantizationSpec("affine", 4, 64)),
        (None, 48, 4, QuantizationSpec("affine", 6, 64)),
        (None, 7, 3, None),
        (QuantizationSpec("nvfp4", 4, 16), 32, 4, None),
    ],
)
def test_shapes_settle_what_the_metadata_leaves_open(
    declared: QuantizationSpec | None, words: int, scales: int, spec: QuantizationSpec | None
):
    assert fitted_spec(declared, (16, words), (16, scales)) == spec


def test_the_logical_shape_keeps_leading_axes():
    assert logical_shape(QuantizationSpec("affine", 4, 32), (3, 5, 8)) == (3, 5, 64)


def test_weights_stay_quantised_where_that_is_fast_or_the_only_way():
    assert not keeps_quantized("auto", "cpu", 100, 100)
    assert keeps_quantized("auto", "cpu", 101, 100)
    assert keeps_quantized("auto", "metal", 1, 100)
    assert keeps_quantized("auto", "cuda", 1, 100)
    assert keeps_quantized("keep", "cpu", 1, 100)
    assert not keeps_quantized("float32", "metal", 101, 100)
