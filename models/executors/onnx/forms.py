"""In which form a matrix is held, decided from headers and mxfp4's exponents, and what that takes in memory.

Quantised weights stay in the bits that the file has: integers of 2, 4 or 8 bits with a scale a block, multiplied by
MatMulNBits with activations rounded to int8 (its accuracy level 4). A format with a zero point has an offset a block
besides, which meets the sums of the activations' blocks. What has no integer form is held in float32, exactly.

With AVX512 a row's product is the same to the last bit however many rows there are if blocks are of 32 values at most
for 4 bits, of 64 for 8 and 2: with larger ones the kernel computes an odd last row in another order (onnxruntime 1.32).
So small models have blocks no larger. Of a large model the bytes count, and one row more costs nothing: its blocks are
the file's groups. Where rows are not treated alike (`kernels`), steps have an even number of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from models.packing import Bytes
from models.quantization import Packed, QuantizationSpec
from models.sources.base import Mapped, TensorInfo
from models.weights.integers import JOINED, can_join

Activations: TypeAlias = Literal["int8", "float32"]
WeightChoice: TypeAlias = Literal["keep", "float32", "int8", "int4"]

DENSE_BITS = 32
EXACT_BLOCK = {2: 64, 4: 32, 8: 64}
"""Up to this size a row's product does not depend on the number of rows, with AVX512."""
LARGE_BYTES = 1 << 30
"""From so many bytes of quantised weights on a model is large."""
FINE_BLOCK = 16
_QUANTIZE_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix (N, K) is held: `bits` 32 is dense float32 (K, N); else codes, float32 scales, perhaps offsets."""

    bits: int
    block: int = 0
    offset_block: int = 0
    """Values that share an offset; 0: there are none."""

    @property
    def is_dense(self) -> bool:
        """Plain float32."""
        return self.bits == DENSE_BITS

    def nbytes(self, outputs: int, inputs: int) -> int:
        """What the kernels hold: packed codes with a scale and a sum a block, the scales as they came, the offsets."""
        if self.is_dense:
            return 4 * outputs * inputs
        blocks = -(-inputs // self.block) * outputs
        offsets = 4 * outputs * (inputs // self.offset_block) if self.offset_block else 0
        return blocks * (self.block * self.bits // 8 + 12) + offsets


DENSE = Form(DENSE_BITS)

# Bits, values of a block, and those that share an offset. Source: llama.cpp ggml/src/ggml-common.h.
_GGML: dict[str, Form] = {
    "Q4_0": Form(4, 32),
    "Q4_1": Form(4, 32, 32),
    "Q5_0": Form(8, 32),
    "Q5_1": Form(8, 32, 32),
    "Q8_0": Form(8, 32),
    # Blocks of 16 want 4 bits: there is no fast kernel for 2.
    "Q2_K": Form(4, 16, 16),
    "Q3_K": Form(4, 16),
    "Q4_K": Form(4, 32, 32),
    "Q5_K": Form(8, 32, 32),
    "Q6_K": Form(8, 16),
}
_AFFINE_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}


def is_large(infos: Iterable[TensorInfo]) -> bool:
    """Whether a model with these tensors is large."""
    return sum(info.nbytes for info in infos if info.quantized) >= LARGE_BYTES


def form_of(info: TensorInfo, choice: WeightChoice, *, large: bool = False) -> Form:
    """The form of a matrix under a user's choice."""
    if choice == "float32" or len(info.shape) != 2:
        return DENSE
    if info.kind in _GGML:
        return _GGML[info.kind]
    if info.spec is not None and info.spec.mode != "mxfp8":
        return _of_mlx(info, info.spec, large=large)
    if choice == "keep" or info.shape[1] % _QUANTIZE_BLOCK:
        return DENSE
    return Form({"int8": 8, "int4": 4}[choice], _QUANTIZE_BLOCK)


def _of_mlx(info: TensorInfo, spec: QuantizationSpec, *, large: bool) -> Form:
    if spec.mode == "affine":
        held = _AFFINE_BITS[spec.bits]
        return Form(held, spec.group_size if large else min(spec.group_size, EXACT_BLOCK[held]), spec.group_size)
    if info.mapped is not None and can_join(_exponents(info.mapped())):
        return Form(8, JOINED)
    return Form(8, spec.group_size)


def _exponents(mapped: Mapped) -> Bytes:
    """mxfp4's, a block each."""
    assert isinstance(mapped.value, Packed)
    return mapped.value.scales


def finer(form: Form) -> Form:
    """The same with blocks of 16, so that activations are rounded in blocks of 16 as well.

    For 4 bits, and for what goes into a softmax: SmolLM2's Q4_1 has 0.0029 nats of KL divergence from its float32 run
    then, and 0.0036 with blocks of 32 throughout (llama.cpp's own: 0.0033). All blocks of 16 give 0.0023 and take a
    quarter longer.
    """
    if form.bits != 4:
        return form
    return replace(form, block=min(form.block, FINE_BLOCK), offset_block=min(form.offset_block, FINE_BLOCK))


def joined(forms: list[Form]) -> Form | None:
    """The form in which matrices of the same input are one; None where they must stay apart."""
    like = {replace(form, offset_block=0) for form in forms}
    offsets = {form.offset_block for form in forms} - {0}
    if len(like) > 1 or len(offsets) > 1:
        return None
    return replace(forms[0], offset_block=max(offsets, default=0))
