"""What leaves a slab and what comes back: evaluated copies of consecutive tokens of one row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from models.executors.mlx.slabs import ClassSlab, LayerSpec, RecurrentSpec, StateSpec

Array = npt.NDArray[Any]
_AS_INTEGERS = {mx.bfloat16: mx.uint16}
"""Types that numpy lacks, and what their bytes are shown as."""


@dataclass(frozen=True, slots=True)
class DeviceSegment:
    """A row's tokens over all layers that have keys and values (see `Segment`).

    Shapes: each array (heads, tokens, width).
    """

    length: int
    """See `Segment.length`."""
    layers: tuple[tuple[mx.array, ...], ...]

    @property
    def nbytes(self) -> int:
        """See `Segment.nbytes`."""
        return sum(array.nbytes for layer in self.layers for array in layer)

    def part(self, begin: int, end: int) -> "DeviceSegment":
        """See `Segment.part`."""
        return _evaluated(end - begin, [[array[:, begin:end] for array in layer] for layer in self.layers])

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """See `Segment.arrays`."""
        for number, layer in enumerate(self.layers):
            for index, array in enumerate(layer):
                shown = array.view(_AS_INTEGERS[array.dtype]) if array.dtype in _AS_INTEGERS else array
                yield f"{number}.{index}", np.array(shown)


@dataclass(frozen=True, slots=True)
class DeviceCheckpoint:
    """What a row's recurrent layers remember (see `Checkpoint`)."""

    layers: tuple[mx.array, ...]

    @property
    def nbytes(self) -> int:
        """See `Checkpoint.nbytes`."""
        return sum(array.nbytes for array in self.layers)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """See `Checkpoint.arrays`."""
        for number, array in enumerate(self.layers):
            yield str(number), np.array(array)


def checkpoint(slab: ClassSlab, place: int, specs: Sequence[StateSpec]) -> DeviceCheckpoint:
    """What the recurrent layers of a row remember, computed, so that it no longer holds what it was copied from."""
    held = [arrays for spec, arrays in zip(specs, slab.layers, strict=True) if isinstance(spec, RecurrentSpec)]
    copies = tuple(mx.contiguous(array[place]) for (array,) in held)
    mx.eval(copies)
    return DeviceCheckpoint(copies)


def go_to(slab: ClassSlab, place: int, specs: Sequence[StateSpec], kept: DeviceCheckpoint) -> None:
    """Have a row's recurrent layers remember what they did when the checkpoint was taken."""
    held = [arrays for spec, arrays in zip(specs, slab.layers, strict=True) if isinstance(spec, RecurrentSpec)]
    for arrays, copy in zip(held, kept.layers, strict=True):
        arrays[0][place] = copy
    mx.eval([arrays[0] for arrays in held])


def read_checkpoint(arrays: Mapping[str, Array], specs: Sequence[StateSpec]) -> DeviceCheckpoint:
    """The checkpoint that had these arrays.

    Raises:
        ValueError: they are not those of the layers.
    """
    shapes = [spec.recurrent.shape for spec in specs if isinstance(spec, RecurrentSpec)]
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != {
        str(number): (shape, np.dtype(np.float32)) for number, shape in enumerate(shapes)
    }:
        raise ValueError("its arrays are not those of this model's recurrent layers")
    return DeviceCheckpoint(tuple(mx.array(arrays[str(number)]) for number in range(len(shapes))))


def _with_keys(specs: Sequence[StateSpec], slab: ClassSlab) -> list[tuple[LayerSpec, list[mx.array]]]:
    """The layers that have keys and values, with their arrays."""
    pairs = zip(specs, slab.layers, strict=True)
    return [(spec, arrays) for spec, arrays in pairs if isinstance(spec, LayerSpec)]


def copied(slab: ClassSlab, place: int, specs: Sequence[StateSpec], begin: int, end: int) -> DeviceSegment:
    """The tokens [begin, end) of a row that its slab holds."""
    layers = []
    for spec, arrays in _with_keys(specs, slab):
        capacity = spec.capacity(slab.capacity)
        if begin % capacity < (end - 1) % capacity + 1 and end - begin <= capacity:
            span = slice(begin % capacity, (end - 1) % capacity + 1)
            layers.append([array[place][:, span] for array in arrays])
        else:
            places = mx.arange(begin, end) % capacity
            layers.append([array[place][:, places] for array in arrays])
    return _evaluated(end - begin, layers)


def restored(slab: ClassSlab, place: int, specs: Sequence[StateSpec], segments: Sequence[DeviceSegment]) -> None:
    """Write the first tokens of a row into its place: all of them, or those that a ring still holds."""
    total = sum(segment.length for segment in segments)
    for number, (spec, arrays) in enumerate(_with_keys(specs, slab)):
        capacity = spec.capacity(slab.capacity)
        begin = max(0, total - capacity)
        places = mx.arange(begin, total) % capacity
        for index, array in enumerate(arrays):
            whole = mx.concatenate([segment.layers[number][index] for segment in segments], axis=1)
            array[place, :, places] = whole[:, begin:]
    mx.eval(list(slab.arrays()))


def read(arrays: Mapping[str, Array], states: Sequence[StateSpec], length: int) -> DeviceSegment:
    """The segment of so many tokens that had these arrays.

    Raises:
        ValueError: they are not those of the layers.
    """
    specs = [spec for spec in states if isinstance(spec, LayerSpec)]
    names = {f"{number}.{index}" for number, spec in enumerate(specs) for index in range(len(spec.widths()))}
    if set(arrays) != names:
        raise ValueError("its arrays are not those of this model's layers")
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
    return _evaluated(length, layers)


def _evaluated(length: int, layers: Sequence[Sequence[mx.array]]) -> DeviceSegment:
    """Copies, computed, so that they no longer hold what they were copied from."""
    copies = tuple(tuple(mx.contiguous(array) for array in layer) for layer in layers)
    mx.eval([array for layer in copies for array in layer])
    return DeviceSegment(length, copies)
