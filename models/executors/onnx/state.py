"""The rows' state on the CPU: slabs of all slots at the whole context, which take memory where they were written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.executors.onnx.memory import VirtualArray
from models.executors.onnx.slabs import SlabSpec
from models.ops import Recurrent

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class HostSegment:
    """Copies of consecutive tokens, an array a slab (see `Segment`). Shapes: (heads, tokens, width)."""

    length: int
    """See `Segment.length`."""
    layers: tuple[tuple[str, Array], ...]

    @property
    def nbytes(self) -> int:
        """See `Segment.nbytes`."""
        return sum(array.nbytes for _, array in self.layers)

    def part(self, begin: int, end: int) -> "HostSegment":
        """See `Segment.part`."""
        return HostSegment(end - begin, tuple((name, array[:, begin:end].copy()) for name, array in self.layers))

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """See `Segment.arrays`."""
        yield from self.layers


@dataclass(frozen=True, slots=True)
class HostCheckpoint:
    """Copies of recurrent layers' states by name (see `Checkpoint`)."""

    layers: tuple[tuple[str, Array], ...]

    @property
    def nbytes(self) -> int:
        """See `Checkpoint.nbytes`."""
        return sum(array.nbytes for _, array in self.layers)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """See `Checkpoint.arrays`."""
        yield from self.layers


class Slabs:
    """The state of all slots: keys and values, and recurrent layers' arrays. Thread: the executor's, but arithmetic."""

    def __init__(
        self,
        specs: Sequence[SlabSpec],
        slots: int,
        capacity: int,
        *,
        again: Mapping[str, str] | None = None,
        states: Mapping[str, Recurrent] | None = None,
    ) -> None:
        """Reserve addresses for `slots` rows of `capacity` tokens; `again`: see `AttentionNodes.again`.

        `states` are those of recurrent layers by name.

        Raises:
            MemoryError: the system gives none.
        """
        self._states = {
            name: VirtualArray((slots, *state.shape), np.dtype(np.float32)) for name, state in (states or {}).items()
        }
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
            for name, memory in self._states.items():
                views[f"past.{name}"] = views[f"present.{name}"] = memory.array[first:end]
            self._views[first, end] = views
        return self._views[first, end]

    def held(self, window: int, tokens: int) -> int:
        """How many of a row's tokens are held by a window of so many."""
        return next(spec.held(tokens) for spec in self.specs if spec.window == window)

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
        return HostSegment(end - begin, tuple(layers))

    @property
    def is_recurrent(self) -> bool:
        """Some layer's state is not divisible by tokens."""
        return bool(self._states)

    @property
    def recurrent_nbytes(self) -> int:
        """What one row's recurrent layers remember."""
        return sum(memory.array[0].nbytes for memory in self._states.values())

    def clear(self, slot: int) -> None:
        """Have a slot's recurrent layers remember nothing."""
        for memory in self._states.values():
            memory.array[slot] = 0

    def checkpoint(self, slot: int) -> HostCheckpoint:
        """A copy of what a slot's recurrent layers remember now."""
        return HostCheckpoint(tuple((name, memory.array[slot].copy()) for name, memory in self._states.items()))

    def go_to(self, slot: int, checkpoint: HostCheckpoint) -> None:
        """Have a slot's recurrent layers remember what they did when the checkpoint was taken."""
        for name, array in checkpoint.layers:
            self._states[name].array[slot] = array

    def read_checkpoint(self, arrays: Mapping[str, Array]) -> HostCheckpoint:
        """See `Executor.read_checkpoint`."""
        held = {name: memory.array for name, memory in self._states.items()}
        if set(arrays) != set(held):
            raise ValueError("its arrays are not those of this model's recurrent layers")
        for name, array in arrays.items():
            if array.shape != held[name].shape[1:] or array.dtype != held[name].dtype:
                raise ValueError(f"its array {name} is {array.dtype} {list(array.shape)}")
        return HostCheckpoint(tuple((name, arrays[name]) for name in held))

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

    def read(self, arrays: Mapping[str, Array], length: int) -> HostSegment:
        """See `Executor.read_segment`."""
        if set(arrays) != {spec.name for spec in self.specs}:
            raise ValueError("its arrays are not those of this model's layers")
        layers = []
        for spec in self.specs:
            array = arrays[spec.name]
            if array.shape != (spec.heads, length, spec.width) or array.dtype != spec.dtype:
                raise ValueError(f"its array {spec.name} is {array.dtype} {list(array.shape)}")
            layers.append((spec.name, array))
        return HostSegment(length, tuple(layers))

    def forget(self, slot: int) -> None:
        """Give a slot's memory back."""
        for memory in (*self._memory.values(), *self._states.values()):
            memory.forget(slot)
