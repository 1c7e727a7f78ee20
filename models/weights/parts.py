"""A rank's part of a stored tensor, and nothing else of it: rows and columns taken out of a view of the file.

Values stay in the bits that are stored. Of columns the system still reads the pages that they lie in.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from models.quantization import Array, Blocks, Packed, Tensor
from models.sharding.cuts import TensorCut
from models.sharding.layout import Range
from models.sources.base import Mapped, NamedTensor, TensorInfo
from models.sources.gguf_blocks import block_size


def group_of(info: TensorInfo) -> int:
    """Of how many neighbours in a row a tensor's values cannot be taken apart. Thread: any."""
    if not info.quantized:
        return 1
    block = block_size(info.kind)
    return block or (info.spec.group_size if info.spec is not None else 1)


def taken(tensor: NamedTensor, cut: TensorCut | None) -> Tensor:
    """The part, copied. None: all of it. Thread: any. Raises CheckpointError."""
    if cut is None:
        return tensor.value
    mapped = tensor.mapped() if tensor.mapped is not None else Mapped(tensor.value)
    match mapped.value:
        case Packed():
            return _packed(mapped.value, cut)
        case Blocks():
            return _blocks(mapped.value, mapped.order, cut)
        case value:
            dense = value.reshape(cut.seen_as, -1) if cut.seen_as and value.ndim > 1 else value
            return _columns(_rows(dense, cut, mapped.order), cut.columns)


def _packed(value: Packed, cut: TensorCut) -> Packed:
    spec = value.spec

    def part(array: Array, per: int) -> Array:
        """Of an array that has a value for `per` columns."""
        columns = cut.columns and tuple((begin // per, end // per) for begin, end in cut.columns)
        return _columns(_rows(array, cut, None), columns)

    words = cut.columns and tuple((begin * spec.bits // 32, end * spec.bits // 32) for begin, end in cut.columns)
    return replace(
        value,
        weight=_columns(_rows(value.weight, cut, None), words),
        scales=part(value.scales, spec.group_size),
        biases=None if value.biases is None else part(value.biases, spec.group_size),
    )


def _blocks(value: Blocks, order: npt.NDArray[np.intp] | None, cut: TensorCut) -> Blocks:
    each = len(value.rows) // value.shape[0]
    by_row = replace(
        cut,
        rows=cut.rows and tuple((begin * each, end * each) for begin, end in cut.rows),
        padding=cut.padding * each,
    )
    bytes_of = value.rows.shape[1]
    columns = cut.columns and tuple(
        (begin * bytes_of // value.shape[-1], end * bytes_of // value.shape[-1]) for begin, end in cut.columns
    )
    rows = _columns(_rows(value.rows, by_row, order), columns)
    inputs = value.shape[-1] if cut.columns is None else sum(end - begin for begin, end in cut.columns)
    return Blocks(rows, value.kind, (len(rows) // each, *value.shape[1:-1], inputs))


def _rows(array: Array, cut: TensorCut, order: npt.NDArray[np.intp] | None) -> Array:
    if cut.rows is None:
        return array if order is None else array[order]
    parts = [array[begin:end] if order is None else array[order[begin:end]] for begin, end in cut.rows]
    if cut.padding:
        parts.append(np.zeros((cut.padding, *array.shape[1:]), array.dtype))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _columns(array: Array, ranges: Sequence[Range] | None) -> Array:
    """Always a copy, so that no view of a file is left."""
    if ranges is None:
        return np.array(array)
    parts = [array[..., begin:end] for begin, end in ranges]
    return np.array(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=-1)
