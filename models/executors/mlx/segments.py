"""What leaves a slab and what comes back: evaluated copies of consecutive tokens of one row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from models.executors.mlx.slabs import ClassSlab, LayerSpec

Array = npt.NDArray[Any]
_AS_INTEGERS = {mx.bfloat16: mx.uint16}
"""Types that numpy lacks, and what their bytes are shown as."""


@dataclass(frozen=True, slots=True)
class DeviceSegment:
    """A row's tokens over all layers (see `Segment`). Shapes: each array (heads, tokens, width)."""

    layers: tuple[tuple[mx.array, ...], ...]

    @property
    def length(self) -> int:
        """See `Segment.length`."""
        return int(self.layers[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        """See `Segment.nbytes`."""
        return sum(array.nbytes for layer in self.layers for array in layer)

    def part(self, begin: int, end: int) -> "DeviceSegment":
        """See `Segment.part`."""
        return _evaluated([[array[:, begin:end] for array in layer] for layer in self.layers])

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """See `Segment.arrays`."""
        for number, layer in enumerate(self.layers):
            for index, array in enumerate(layer):
                shown = array.view(_AS_INTEGERS[array.dtype]) if array.dtype in _AS_INTEGERS else array
                yield f"{number}.{index}", np.array(shown)


def copied(slab: ClassSlab, place: int, specs: Sequence[LayerSpec], begin: int, end: int) -> DeviceSegment:
    """The tokens [begin, end) of a row that its slab holds."""
    layers = []
    for spec, arrays in zip(specs, slab.layers, strict=True):
        capacity = spec.capacity(slab.capacity)
        if begin % capacity < (end - 1) % capacity + 1 and end - begin <= capacity:
            span = slice(begin % capacity, (end - 1) % capacity + 1)
            layers.append([array[place][:, span] for array in arrays])
        else:
            places = mx.arange(begin, end) % capacity
            layers.append([array[place][:, places] for array in arrays])
    return _evaluated(layers)


def restored(slab: ClassSlab, place: int, specs: Sequence[LayerSpec], segments: Sequence[DeviceSegment]) -> None:
    """Write the first tokens of a row into its place: all of them, or those that a ring still holds."""
    total = sum(segment.length for segment in segments)
    for number, (spec, arrays) in enumerate(zip(specs, slab.layers, strict=True)):
        capacity = spec.capacity(slab.capacity)
        begin = max(0, total - capacity)
        places = mx.arange(begin, total) % capacity
        for index, array in enumerate(arrays):
            whole = mx.concatenate([segment.layers[number][index] for segment in segments], axis=1)
            array[place, :, places] = whole[:, begin:]
    mx.eval(list(slab.arrays()))


def read(arrays: Mapping[str, Array], specs: Sequence[LayerSpec]) -> DeviceSegment:
    """The segment that had these arrays.

    Raises:
        ValueError: they are not those of the layers.
    """
    names = {f"{number}.{index}" for number, spec in enumerate(specs) for index in range(len(spec.widths()))}
    lengths = {array.shape[1] for array in arrays.values() if array.ndim == 3}
    if set(arrays) != names or len(lengths) != 1:
        raise ValueError("its arrays are not those of this model's layers")
    (length,) = lengths
    layers = []
    for number, spec in enumerate(specs):
        layer = []
        for index, (width, dtype) in enumerate(spec.widths()):
            array = mx.array(arrays[f"{number}.{index}"])
            shown = _AS_INTEGERS.get(dtype, dtype)
            if array.shape != (spec.kv.heads, length, width) or array.dtype != shown:
                raise ValueError(f"its array {number}.{index} is {array.dtype} {list(array.shape)}")
            layer.append(array.view(dtype) if shown != dtype else array)
        layers.append(layer)
    return _evaluated(layers)


def _evaluated(layers: Sequence[Sequence[mx.array]]) -> DeviceSegment:
    """Copies, computed, so that they no longer hold what they were copied from."""
    copies = tuple(tuple(mx.contiguous(array) for array in layer) for layer in layers)
    mx.eval([array for layer in copies for array in layer])
    return DeviceSegment(copies)
