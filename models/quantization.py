"""How weights are quantised, what they are worth, and what this device does about it.

Values are NumPy's; bfloat16 is `ml_dtypes.bfloat16`. What an executor's library wants is made of them elsewhere
(`models.weights.integers`, `models.to_mlx`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import gguf
import numpy as np
import numpy.typing as npt

from models.errors import QuantizationError
from models.packing import Floats, e2m1, e4m3, e8m0, unpacked

Array: TypeAlias = npt.NDArray[Any]
Mode: TypeAlias = Literal["affine", "nvfp4", "mxfp4", "mxfp8"]
WeightPolicy: TypeAlias = Literal["auto", "float32", "keep"]
DeviceKind: TypeAlias = Literal["cpu", "metal", "cuda"]


@dataclass(frozen=True, slots=True)
class QuantizationSpec:
    """The parameters of `mx.quantize`: mode, bits per weight and weights per scale."""

    mode: Mode
    bits: int
    group_size: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised matrix in MLX's packed layout.

    Shapes: weight uint32 (..., out, in * bits / 32); scales (..., out, in / group_size), floating for affine and uint8
    for the others; biases like scales (affine's zero point, never the layer's bias) or None; global_scale float32, one
    element that multiplies every weight (nvfp4 as NVIDIA stores it), or None.
    """

    weight: Array
    scales: Array
    biases: Array | None
    spec: QuantizationSpec
    global_scale: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for."""
        return logical_shape(self.spec, self.weight.shape)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in one of GGML's block formats, its rows in Hugging Face's order.

    Shapes: rows uint8 (product of all axes of `shape` but the last, bytes of a row).
    """

    rows: npt.NDArray[np.uint8]
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]


Tensor: TypeAlias = Array | Packed | Blocks
"""A stored tensor's value: dense, or quantised in MLX's way or GGML's."""


# What MLX 0.32 has kernels for. Source: the table of quantisation modes in mlx.core.quantize.
_DEFAULTS: Mapping[Mode, tuple[int, int]] = {"affine": (4, 64), "nvfp4": (4, 16), "mxfp4": (4, 32), "mxfp8": (8, 32)}
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (32, 64, 128)

# Ollama's `quant_type`. Source: ollama v0.33.0-rc2 x/quant/quant.go.
_QUANT_TYPES: Mapping[str, tuple[Mode, int]] = {
    "int4": ("affine", 4),
    "fp4": ("affine", 4),
    "q4": ("affine", 4),
    "int8": ("affine", 8),
    "fp8": ("affine", 8),
    "q8": ("affine", 8),
    "nvfp4": ("nvfp4", 4),
    "mxfp4": ("mxfp4", 4),
    "mxfp8": ("mxfp8", 8),
}


def checked_spec(mode: str, bits: int | None, group_size: int | None) -> QuantizationSpec:
    """A spec that MLX can run, absent values filled in from the mode's defaults.

    Raises:
        QuantizationError: MLX has no such mode, bits or group size.
    """
    known: Mode | None = next((name for name in get_args(Mode) if name == mode), None)
    if known is None:
        raise QuantizationError(f"quantisation mode {mode!r} is unknown; known are {', '.join(get_args(Mode))}")
    default_bits, default_group = _DEFAULTS[known]
    spec = QuantizationSpec(known, bits or default_bits, group_size or default_group)
    fits = (
        spec.bits in _AFFINE_BITS and spec.group_size in _AFFINE_GROUPS
        if known == "affine"
        else (spec.bits, spec.group_size) == (default_bits, default_group)
    )
    if not fits:
        raise QuantizationError(
            f"{mode} quantisation with {spec.bits} bits in groups of {spec.group_size} is not supported"
        )
    return spec


def spec_of_settings(settings: Mapping[str, object]) -> QuantizationSpec:
    """The spec of an MLX `quantization` entry of config.json, the model's or one layer's: mode, bits, group_size.

    Raises:
        QuantizationError: a value is not of its kind, or MLX has no such quantisation.
    """
    mode = settings.get("mode") or "affine"
    if not isinstance(mode, str):
        raise QuantizationError(f"config.json: quantization mode {mode!r} is no text")
    return checked_spec(mode, _count(settings, "bits"), _count(settings, "group_size"))


def spec_of_quant_type(quant_type: str, group_size: int | None) -> QuantizationSpec:
    """The spec of Ollama's `quant_type` and `group_size` metadata; the shapes know better: see `fitted_spec`.

    Raises:
        QuantizationError: the type is unknown.
    """
    known = _QUANT_TYPES.get(quant_type.strip().lower())
    if known is None:
        raise QuantizationError(f"quantisation type {quant_type!r} is unknown; known are {', '.join(_QUANT_TYPES)}")
    mode, bits = known
    return checked_spec(mode, bits, group_size if mode == "affine" else None)


def _count(settings: Mapping[str, object], key: str) -> int | None:
    value = settings.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
        raise QuantizationError(f"config.json: quantization has {key} = {value!r}")
    return value


def logical_shape(spec: QuantizationSpec, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the matrix whose packed weights have `weight_shape`."""
    return (*weight_shape[:-1], weight_shape[-1] * 32 // spec.bits)


def packed_nbytes(spec: QuantizationSpec, shape: tuple[int, ...], scale_itemsize: int) -> int:
    """The bytes of a packed matrix of that logical shape. Affine has a scale and a bias for each group."""
    elements = math.prod(shape)
    per_group = 2 * scale_itemsize if spec.mode == "affine" else 1
    return elements * spec.bits // 8 + elements // spec.group_size * per_group


def shapes_agree(spec: QuantizationSpec, weight_shape: tuple[int, ...], scales_shape: tuple[int, ...]) -> bool:
    """Whether packed weights and scales of these shapes can be of this spec."""
    if len(weight_shape) < 2 or weight_shape[:-1] != scales_shape[:-1] or weight_shape[-1] * 32 % spec.bits:
        return False
    return weight_shape[-1] * 32 // spec.bits == scales_shape[-1] * spec.group_size


def fitted_spec(
    spec: QuantizationSpec | None, weight_shape: tuple[int, ...], scales_shape: tuple[int, ...]
) -> QuantizationSpec | None:
    """The affine spec that the shapes of packed weights and scales allow, nearest to what the metadata says.

    The shapes give only bits times group size. Ollama makes 4 and 8 bits, so these come first; then the declared group
    size (a model's layers differ in bits more often than in groups), then the declared bits; with nothing declared, 4
    bits in 32s and 8 bits in 64s are what its importer makes. None if nothing fits.

    Source: ollama v0.24.0 x/mlxrunner/model/quant.go, InferAffineQuantParamsFromShapes.
    """
    if spec is not None and (spec.mode != "affine" or shapes_agree(spec, weight_shape, scales_shape)):
        return spec if shapes_agree(spec, weight_shape, scales_shape) else None
    candidates = [QuantizationSpec("affine", bits, group) for bits in _AFFINE_BITS for group in _AFFINE_GROUPS]
    fitting = [each for each in candidates if shapes_agree(each, weight_shape, scales_shape)]
    usual = (QuantizationSpec("affine", 4, 32), QuantizationSpec("affine", 8, 64), QuantizationSpec("affine", 4, 64))

    def distance(each: QuantizationSpec) -> tuple[bool, bool, bool, int, int]:
        unlike_group = spec is None or each.group_size != spec.group_size
        unlike_bits = spec is None or each.bits != spec.bits
        rank = usual.index(each) if each in usual else len(usual)
        return each.bits not in (4, 8), unlike_group, unlike_bits, rank, abs(each.group_size - 64)

    return min(fitting, key=distance, default=None)


def dequantize(value: Packed | Blocks) -> Floats:
    """The dense matrix in float32, each value as MLX or GGML computes it. Thread: any.

    Scales go through float32, so that a half-precision scale costs no precision of its own. A block whose scale is no
    number makes values that are none.

    Shapes: returns `value.shape`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(value, Packed):
            return _dequantized(value)
        values: Floats = gguf.dequantize(value.rows, value.kind)
        return values.reshape(value.shape)


def _dequantized(packed: Packed) -> Floats:
    spec = packed.spec
    codes = unpacked(packed.weight, spec.bits)
    match spec.mode:
        case "affine":
            values, scales = codes.astype(np.float32), packed.scales.astype(np.float32)
        case "nvfp4":
            values, scales = e2m1(codes), e4m3(packed.scales)
        case "mxfp4":
            values, scales = e2m1(codes), e8m0(packed.scales)
        case "mxfp8":
            values, scales = e4m3(codes), e8m0(packed.scales)
    grouped = values.reshape(*scales.shape, spec.group_size)
    grouped *= scales[..., None]
    if packed.biases is not None:
        grouped += packed.biases.astype(np.float32)[..., None]
    if packed.global_scale is not None:
        grouped *= packed.global_scale.astype(np.float32).reshape(())
    return grouped.reshape(packed.shape)


def keeps_quantized(
    policy: WeightPolicy, device_kind: DeviceKind, needed_float32_bytes: int, available_bytes: int
) -> bool:
    """Whether quantised weights stay quantised on this device.

    On a GPU the quantised kernels are the fast ones. On the CPU they run at a hundredth of a float32 matrix product, so
    there `auto` dequantises whenever the float32 weights fit.
    """
    match policy:
        case "keep":
            return True
        case "float32":
            return False
        case "auto":
            return device_kind != "cpu" or needed_float32_bytes > available_bytes
