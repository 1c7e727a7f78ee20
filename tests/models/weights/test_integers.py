"""The integer form of every format holds the file's values."""

import tracemalloc
from dataclasses import replace
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as Kind

from models.packing import unpacked
from models.quantization import Blocks, Packed, QuantizationSpec, dequantize
from models.weights.ggml import LAYOUTS
from models.weights.integers import Integers, can_join, integers, quantized

RANDOM = np.random.default_rng(23)
# Where the half-precision scales of a block are; random bytes would make infinities of them.
HALVES = {
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,),
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
}  # fmt: skip
FORMS = {
    Kind.Q4_0: (4, 32, False), Kind.Q4_1: (4, 32, True), Kind.Q5_0: (8, 32, False), Kind.Q5_1: (8, 32, True),
    Kind.Q8_0: (8, 32, False), Kind.Q2_K: (2, 16, True), Kind.Q3_K: (4, 16, False), Kind.Q4_K: (4, 32, True),
    Kind.Q5_K: (8, 32, True), Kind.Q6_K: (8, 16, False),
}  # fmt: skip
SHAPE = (7, 768)


def blocks_of(kind: Kind, shape: tuple[int, int] = SHAPE) -> Blocks:
    """Every bit random but those of the scales, which are of both signs."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = RANDOM.integers(0, 256, (shape[0], shape[1] // values, nbytes), np.uint8)
    for start in HALVES[kind]:
        halves = RANDOM.normal(size=blocks.shape[:2]).astype(np.float16)
        blocks[..., start : start + 2] = halves[..., None].view(np.uint8)
    return Blocks(blocks.reshape(shape[0], -1), kind, shape)


def packed_of(spec: QuantizationSpec, dtype: npt.DTypeLike = np.float16, shape: tuple[int, int] = SHAPE) -> Packed:
    weight = RANDOM.integers(0, 2**32, (shape[0], shape[1] * spec.bits // 32), np.uint32)
    groups = (shape[0], shape[1] // spec.group_size)
    if spec.mode == "affine":
        return Packed(weight, RANDOM.normal(size=groups).astype(dtype), RANDOM.normal(size=groups).astype(dtype), spec)
    return Packed(weight, RANDOM.integers(100, 126, groups, np.uint8), None, spec)


def checked(found: Integers | None, shape: tuple[int, int] = SHAPE) -> Integers:
    """Shapes, types and range are as promised."""
    assert found is not None
    assert (found.codes.shape, found.codes.dtype) == ((shape[0], shape[1] * found.bits // 8), np.uint8)
    assert found.zero == 1 << (found.bits - 1)
    for part in (found.scales, found.offsets):
        if part is not None:
            assert (part.shape, part.dtype) == ((shape[0], shape[1] // found.group), np.float32)
    return found


def codes_of(form: Integers) -> npt.NDArray[np.uint8]:
    return unpacked(form.codes, form.bits)


def rounded(dense: npt.NDArray[np.float32], bits: int, group: int = 32) -> Integers:
    return quantized(dense.shape, dense.__getitem__, bits, group)


def values_of(form: Integers) -> npt.NDArray[np.float32]:
    """What the form says, each value rounded to float32 once or, where it has an offset, twice."""
    groups = (codes_of(form).astype(np.float32) - form.zero).reshape(*form.scales.shape, form.group)
    groups = groups * form.scales[..., None]
    return (groups if form.offsets is None else groups + form.offsets[..., None]).reshape(len(groups), -1)


def assert_exact_but_for_the_offset(
    form: Integers, codes: npt.NDArray[np.uint8], scales: npt.NDArray[Any], least: npt.NDArray[Any]
) -> None:
    """Half a unit in the last place of the offset from `scales * codes + least`, both computed in float64."""
    assert form.offsets is not None
    shape = (*form.scales.shape, form.group)
    theirs = codes.reshape(shape) * scales.astype(np.float64)[..., None] + least.astype(np.float64)[..., None]
    centred = codes_of(form).reshape(shape).astype(np.float64) - form.zero
    ours = centred * form.scales[..., None] + form.offsets[..., None]
    assert (np.abs(ours - theirs) <= 0.5001 * np.spacing(np.abs(form.offsets))[..., None]).all()


def assert_near(form: Integers, values: npt.NDArray[np.float32]) -> None:
    """The offset, and on both sides product and sum, are rounded: five halves of a unit in the last place of all."""
    assert form.offsets is not None
    whole = np.abs(form.offsets) + np.abs(form.scales) * (1 << form.bits)
    error = np.abs(values_of(form) - values).reshape(*form.scales.shape, form.group)
    assert (error <= 2.5 * np.spacing(whole)[..., None]).all()


@pytest.mark.parametrize("kind", FORMS)
def test_ggmls_blocks_hold_what_ggml_dequantises(kind: Kind):
    blocks = blocks_of(kind)
    form = checked(integers(blocks))
    assert (form.bits, form.group, form.offsets is not None) == FORMS[kind]
    values = gguf.dequantize(blocks.rows, kind)
    if form.offsets is None:
        assert np.array_equal(values_of(form), values)
        return
    layout = LAYOUTS[kind]
    rows = blocks.rows.reshape(-1, layout.nbytes)
    scales, least = (part.reshape(form.scales.shape) for part in layout.scales(rows) if part is not None)
    assert_exact_but_for_the_offset(form, layout.codes(rows), scales, least)
    assert_near(form, values)


@pytest.mark.parametrize("kind", FORMS)
def test_ggmls_codes_are_its_own(kind: Kind):
    blocks = blocks_of(kind)
    layout = LAYOUTS[kind]
    assert gguf.GGML_QUANT_SIZES[kind][1] == layout.nbytes
    rows = blocks.rows.reshape(-1, layout.nbytes)
    codes, (scales, least) = layout.codes(rows), layout.scales(rows)
    assert codes.max() == (1 << layout.bits) - 1
    groups = codes.reshape(*scales.shape, layout.group).astype(np.float32)
    # Two roundings in the same order as GGML's: the same to the bit.
    if least is None:
        values = (groups - (1 << (layout.bits - 1))) * scales[..., None]
    else:
        values = groups * scales[..., None] + least[..., None]
    assert np.array_equal(values.reshape(SHAPE), gguf.dequantize(blocks.rows, kind))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_mlxs_affine_matrices_hold_what_mlx_dequantises(bits: int, group: int, dtype: npt.DTypeLike):
    packed = packed_of(QuantizationSpec("affine", bits, group), dtype)
    form = checked(integers(packed))
    assert (form.bits, form.group) == ({2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}[bits], group)
    assert packed.biases is not None
    assert_exact_but_for_the_offset(form, unpacked(packed.weight, bits), packed.scales, packed.biases)
    assert_near(form, dequantize(packed))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("least", [4, 8])
def test_codes_may_be_held_in_more_bits_than_they_have(bits: int, least: int):
    packed = packed_of(QuantizationSpec("affine", bits, 64))
    form = checked(integers(packed, least))
    assert form.bits == max(least, 4 if bits < 5 else 8)
    assert_near(form, dequantize(packed))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_that_lie_as_the_kernels_want_them_are_not_copied(bits: int):
    packed = packed_of(QuantizationSpec("affine", bits, 64))
    form = integers(packed)
    assert form is not None
    assert np.shares_memory(form.codes, packed.weight)


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_offsets_of_nothing_but_zero_are_left_out(bits: int):
    spec = QuantizationSpec("affine", bits, 32)
    packed = packed_of(spec)
    biases = packed.scales.astype(np.float32) * np.float32(-(1 << (bits - 1)))
    symmetric = Packed(packed.weight, packed.scales, biases, spec)
    form = checked(integers(symmetric))
    assert form.offsets is None
    # The same values but for MLX's rounding of product and sum.
    terms = np.spacing(np.abs(biases)).repeat(32, axis=1)
    assert (np.abs(values_of(form) - dequantize(symmetric)) <= terms).all()


@pytest.mark.parametrize(("mode", "group"), [("mxfp4", 32), ("nvfp4", 16)])
def test_floats_of_four_bits_are_whole_numbers_when_doubled(mode: str, group: int):
    packed = packed_of(QuantizationSpec(mode, 4, group))
    form = checked(integers(packed))
    assert (form.bits, form.zero, form.group, form.offsets) == (8, 128, group, None)
    assert (codes_of(form).min(), codes_of(form).max()) == (116, 140)
    assert np.array_equal(values_of(form), dequantize(packed))


@pytest.mark.parametrize("scale", [None, np.full((1,), 0.3, np.float32)])
def test_neighbouring_blocks_of_mxfp4_are_one(scale: npt.NDArray[np.float32] | None):
    packed = packed_of(QuantizationSpec("mxfp4", 4, 32))
    near = replace(packed, scales=RANDOM.integers(118, 122, packed.scales.shape, np.uint8), global_scale=scale)
    assert can_join(near.scales)
    form = checked(integers(near, block=64))
    assert (form.bits, form.zero, form.group, form.offsets) == (8, 128, 64, None)
    assert (codes_of(form).min(), codes_of(form).max()) == (128 - 96, 128 + 96)
    np.testing.assert_allclose(values_of(form), dequantize(near), rtol=0 if scale is None else 2e-7, atol=0)
    assert checked(integers(near, block=32)).group == 32


@pytest.mark.parametrize(
    ("exponents", "joins"),
    [
        ([[118, 121, 7, 7]], True),
        ([[121, 118, 7, 7]], True),
        # Only neighbours matter, not what is beside them.
        ([[118, 118, 121, 122], [9, 9, 200, 200]], True),
        ([[118, 118, 121, 121], [118, 122, 121, 121]], False),
        ([[0, 255, 0, 0]], False),
        ([[255, 255]], False),
        ([[118, 118, 118]], False),
    ],
)
def test_blocks_join_where_eight_bits_hold_them(exponents: list[list[int]], *, joins: bool):
    assert can_join(np.array(exponents, np.uint8)) is joins


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_global_scale_is_part_of_the_scales(shape: tuple[int, ...]):
    packed = packed_of(QuantizationSpec("nvfp4", 4, 16))
    scaled = Packed(packed.weight, packed.scales, None, packed.spec, np.full(shape, 0.3, np.float32))
    exact = dequantize(scaled)
    # The product with the scale is rounded before that with the code: a unit in the last place.
    assert (np.abs(values_of(checked(integers(scaled))) - exact) <= np.spacing(np.abs(exact))).all()


def test_what_has_no_integer_form_is_told():
    assert integers(packed_of(QuantizationSpec("mxfp8", 8, 32))) is None
    stacked = packed_of(QuantizationSpec("affine", 4, 32))
    parts = (part.reshape(7, 1, -1) for part in (stacked.weight, stacked.scales, stacked.biases))
    assert integers(Packed(*parts, stacked.spec)) is None
    assert integers(Blocks(np.zeros((2, 66), np.uint8), Kind.IQ2_XXS, (2, 256))) is None


def test_more_rows_than_are_worked_on_at_once_stay_in_order():
    blocks = blocks_of(Kind.Q6_K, (1500, 1024))
    form = checked(integers(blocks), (1500, 1024))
    assert np.array_equal(values_of(form), gguf.dequantize(blocks.rows, Kind.Q6_K))
    one = integers(Blocks(blocks.rows[1200:1201], Kind.Q6_K, (1, 1024)))
    assert one is not None
    assert np.array_equal(one.codes[0], form.codes[1200])


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q6_K])
def test_the_peak_is_a_few_times_the_matrix(kind: Kind):
    blocks = blocks_of(kind, (576, 16384))
    tracemalloc.start()
    form = integers(blocks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert form is not None
    assert peak < 2.5 * form.codes.nbytes + 8 * (1 << 20)


@pytest.mark.parametrize(("bits", "error"), [(4, 0.12), (8, 0.007)])
def test_a_dense_matrix_is_rounded_to_the_nearest_code(bits: int, error: float):
    dense = RANDOM.normal(size=(1200, 1024)).astype(np.float32)
    form = checked(rounded(dense, bits), dense.shape)
    assert (form.bits, form.group, form.offsets) == (bits, 32, None)
    difference = np.abs(values_of(form) - dense).reshape(*form.scales.shape, 32)
    steps = np.abs(form.scales)[..., None]
    # Values at the other end of the range lose up to a step: there is one code less there.
    clipped = codes_of(form).reshape(difference.shape) == (1 << bits) - 1
    assert (difference <= np.where(clipped, 1.0001, 0.5001) * steps).all()
    assert np.sqrt((difference**2).mean()) < error


@pytest.mark.parametrize(("bits", "kind"), [(4, Kind.Q4_0), (8, Kind.Q8_0)])
def test_rounding_is_ggmls_but_for_its_half_precision_scales(bits: int, kind: Kind):
    dense = RANDOM.normal(size=(16, 256)).astype(np.float32)
    theirs = integers(Blocks(gguf.quantize(dense, kind), kind, dense.shape))
    ours = rounded(dense, bits)
    assert theirs is not None
    assert np.allclose(ours.scales, theirs.scales, rtol=2**-10)
    assert (codes_of(ours) == codes_of(theirs)).mean() > 0.999


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_zeros_stays_so(bits: int):
    dense = np.zeros((2, 64), np.float32)
    dense[1, 40] = -3
    assert np.array_equal(values_of(rounded(dense, bits)), dense)


def test_groups_are_as_large_as_asked():
    dense = RANDOM.normal(size=(4, 256)).astype(np.float32)
    form = checked(rounded(dense, 8, 128), dense.shape)
    assert form.group == 128
    assert np.abs(values_of(form) - dense).max() <= np.abs(form.scales).max()
