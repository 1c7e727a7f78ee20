"""The rows' state on the CPU: slabs of all slots at the whole context, which take memory where they were written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from models.executors.onnx.memory import VirtualArray
from models.executors.onnx.slabs import SlabSpec

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class HostSegment:
    """Copies of consecutive tokens, an array a slab (see `Segment`). Shapes: (heads, tokens, width)."""

    layers: tuple[tuple[str, Array], ...]

    @property
    def length(self) -> int:
        """See `Segment.length`."""
        return int(self.layers[0][1].shape[1])

    @property
    def nbytes(self) -> int:
        """See `Segment.nbytes`."""
        return sum(array.nbytes for _, array in self.layers)

    def part(self, begin: int, end: int) -> "HostSegment":
        """See `Segment.part`."""
        return HostSegment(tuple((name, array[:, begin:end].copy()) for name, array in self.layers))

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """See `Segment.arrays`."""
        yield from self.layers


class Slabs:
    """Keys and values of all slots. Thread: the executor's, but for the arithmetic."""

    def __init__(
        self, specs: Sequence[SlabSpec], slots: int, capacity: int, again: Mapping[str, str] | None = None
    ) -> None:
        """Reserve addresses for `slots` rows of `capacity` tokens; `again`: see `AttentionNodes.again`.

        Raises:
            MemoryError: the system gives none.
        """
        self.specs = tuple(specs)
        self.capacity = capacity
        self._again = again or {}
        self._memory = {
            spec.name: VirtualArray((slots, spec.heads, spec.capacity(capacity), spec.width), spec.dtype)
            for spec in specs
        }
        self._views: dict[tuple[int, int], dict[str, Array]] = {}

    def views(self, first: int, end: int) -> Mapping[str, Array]:
        """Inputs and outputs of a graph that are the slots [first, end), by name."""
        if (first, end) not in self._views:
            views: dict[str, Array] = {}
            for spec in self.specs:
                whole = self._memory[spec.name].array
                views[f"past.{spec.name}"] = views[f"present.{spec.name}"] = whole[first:end]
                if spec.stands_for:
                    views[f"present.{spec.stands_for}"] = whole[first:end]
                if spec.flat:
                    flat = whole.reshape(-1, spec.width)
                    views[f"flat.{spec.name}"] = views[f"present.{spec.name}"] = flat
            views |= {name: views[f"past.{slab}"] for name, slab in self._again.items()}
            self._views[first, end] = views
        return self._views[first, end]

    def first_held(self, tokens: int) -> int:
        """See `Executor.first_held`."""
        return max((tokens - spec.held(tokens) for spec in self.specs), default=0)

    def segment(self, slot: int, tokens: int, begin: int, end: int) -> HostSegment:
        """See `Executor.segment`."""
        layers = []
        for spec in self.specs:
            shift = tokens - spec.held(tokens)
            held = self._memory[spec.name].array[slot, :, begin - shift : end - shift]
            layers.append((spec.name, held.copy()))
        return HostSegment(tuple(layers))

    def restore(self, slot: int, segments: Sequence[HostSegment]) -> None:
        """See `Executor.restore`."""
        tokens = sum(segment.length for segment in segments)
        for index, spec in enumerate(self.specs):
            skipped = tokens - spec.held(tokens)
            at = -skipped
            for segment in segments:
                array = segment.layers[index][1]
                length = array.shape[1]
                if at + length > 0:
                    self._memory[spec.name].array[slot, :, max(at, 0) : at + length] = array[:, max(-at, 0) :]
                at += length

    def read(self, arrays: Mapping[str, Array]) -> HostSegment:
        """See `Executor.read_segment`."""
        lengths = {array.shape[1] for array in arrays.values() if array.ndim == 3}
        if len(lengths) != 1 or set(arrays) != {spec.name for spec in self.specs}:
            raise ValueError("its arrays are not those of this model's layers")
        layers = []
        for spec in self.specs:
            array = arrays[spec.name]
            if array.shape != (spec.heads, array.shape[1], spec.width) or array.dtype != spec.dtype:
                raise ValueError(f"its array {spec.name} is {array.dtype} {list(array.shape)}")
            layers.append((spec.name, array))
        return HostSegment(tuple(layers))

    def forget(self, slot: int) -> None:
        """Give a slot's memory back."""
        for memory in self._memory.values():
            memory.forget(slot)
