"""How weights are quantised, and what this device does about it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Mode: TypeAlias = Literal["affine", "nvfp4", "mxfp4", "mxfp8"]
WeightPolicy: TypeAlias = Literal["auto", "float32", "keep"]


@dataclass(frozen=True, slots=True)
class QuantizationSpec:
    """The parameters of `mx.quantize`: mode, bits per weight and weights per scale."""

    mode: Mode
    bits: int
    group_size: int
