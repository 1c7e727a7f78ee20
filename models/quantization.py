"""How weights are quantised, and what this device does about it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import mlx.core as mx

from models.errors import QuantizationError

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

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    spec: QuantizationSpec
    global_scale: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for."""
        return logical_shape(self.spec, self.weight.shape)


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


def dequantize(packed: Packed, dtype: mx.Dtype) -> mx.array:
    """The dense matrix. Scales go through float32, so that a half-precision scale costs no precision of its own.

    Shapes: returns `packed.shape`, lazy.
    """
    spec = packed.spec
    affine = spec.mode == "affine"
    dense = mx.dequantize(
        packed.weight,
        packed.scales.astype(mx.float32) if affine else packed.scales,
        packed.biases.astype(mx.float32) if packed.biases is not None else None,
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=mx.float32,
    )
    if packed.global_scale is not None:
        dense = dense * packed.global_scale.astype(mx.float32).reshape(())
    return dense.astype(dtype)


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
