"""The rows' state on MLX: slabs of rows of one capacity class, an array or three for keys and as many for values.

A slab is (rows, heads, capacity, width). Capacities are 256 tokens times powers of four; a row moves once when it
outgrows its class, and the rows of a class lie at its first places without a hole, so that those that decode together
are a slice. A windowed layer's slab is a ring: position p lies at p % capacity.

A write is in place only while nothing lazy reads the old array, so nobody outside holds one: a step writes, then looks,
and what leaves is an evaluated copy.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx

from models.errors import QuantizationError
from models.executors.mlx.kinds import GROUP, CacheType, kind_bits
from models.ops import KV, LayerState, Recurrent

SMALLEST_CLASS, CLASS_FACTOR = 256, 4
RING_STEP = 256
LONGEST_STEP = 512
"""Tokens of a row that one step runs at most, where nobody says otherwise."""


def class_capacity(tokens: int) -> int:
    """The capacity of the class of a row of so many tokens."""
    capacity = SMALLEST_CLASS
    while capacity < tokens:
        capacity *= CLASS_FACTOR
    return capacity


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """How a layer's state is held."""

    kv: KV
    bits: int | None
    """None: in the compute type."""
    dtype: mx.Dtype
    longest_step: int

    def capacity(self, of_class: int) -> int:
        """Tokens that a row of the class has room for here: all, or the window and the longest step behind it."""
        if self.kv.window is None:
            return of_class
        ring = -(-(self.kv.window + self.longest_step) // RING_STEP) * RING_STEP
        return min(of_class, ring)

    def widths(self) -> list[tuple[int, mx.Dtype]]:
        """Width and type of each array: keys' first, then values'."""
        widths: list[tuple[int, mx.Dtype]] = []
        for dim in (self.kv.key_dim,) if self.kv.values_in_keys else (self.kv.key_dim, self.kv.value_dim):
            if self.bits is None:
                widths.append((dim, self.dtype))
            else:
                widths += [(dim * self.bits // 32, mx.uint32), (dim // GROUP, self.dtype), (dim // GROUP, self.dtype)]
        return widths

    def first_held(self, tokens: int) -> int:
        """The oldest of a row's tokens that nothing has overwritten, not even drafts that were taken back."""
        if self.kv.window is None:
            return 0
        reached = tokens + self.longest_step - 1
        return max(0, reached - self.capacity(class_capacity(reached)))

    def nbytes(self, of_class: int) -> int:
        """What one row of the class takes."""
        return self.kv.heads * self.capacity(of_class) * sum(width * dtype.size for width, dtype in self.widths())

    def zeros(self, rows: int, of_class: int) -> list[mx.array]:
        """The arrays of so many empty places."""
        shape = (rows, self.kv.heads, self.capacity(of_class))
        return [mx.zeros((*shape, width), dtype=dtype) for width, dtype in self.widths()]


@dataclass(frozen=True, slots=True)
class RecurrentSpec:
    """How a recurrent layer's state is held: one array of float32 a row, whatever its class."""

    recurrent: Recurrent

    def nbytes(self, _of_class: int) -> int:
        """What one row of the class takes."""
        return math.prod(self.recurrent.shape) * mx.float32.size

    def zeros(self, rows: int, _of_class: int) -> list[mx.array]:
        """The arrays of so many empty places."""
        return [mx.zeros((rows, *self.recurrent.shape), dtype=mx.float32)]


StateSpec: TypeAlias = LayerSpec | RecurrentSpec


def layer_specs(
    state: Sequence[LayerState], cache_type: CacheType, dtype: mx.Dtype, longest_step: int
) -> tuple[StateSpec, ...]:
    """How each layer's state is held.

    Raises:
        QuantizationError: the heads cannot be held so.
    """
    bits = kind_bits(cache_type)
    for kv in (each for each in state if isinstance(each, KV)):
        if bits is not None and kv.values_in_keys:
            raise QuantizationError(f"latents are not held as {cache_type}; choose the cache type f16")
        wrong = [dim for dim in (kv.key_dim, kv.value_dim) if bits is not None and dim % GROUP]
        if wrong:
            raise QuantizationError(
                f"a {cache_type} cache needs heads of a multiple of {GROUP} dimensions, and this model's have "
                f"{wrong[0]}; choose the cache type f16"
            )
    return tuple(
        LayerSpec(each, bits, dtype, longest_step) if isinstance(each, KV) else RecurrentSpec(each) for each in state
    )


@dataclass(slots=True)
class ClassSlab:
    """All layers' slabs of one class, and which slot's row lies at which place."""

    capacity: int
    layers: list[list[mx.array]]
    rows: list[int] = field(default_factory=list)
    written: int = 0
    """So many of the first places may hold what a row left there."""

    @property
    def room(self) -> int:
        """Rows that there is room for."""
        return int(self.layers[0][0].shape[0]) if self.layers else 0

    def arrays(self) -> Iterator[mx.array]:
        """All arrays."""
        for layer in self.layers:
            yield from layer

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.arrays())

    def append(self, slot: int) -> None:
        """Give a slot the next place, empty: a NaN that a row left would pass through a weight of 0."""
        at = len(self.rows)
        if at < self.written:
            for array in self.arrays():
                array[at : at + 1] = 0
        self.rows.append(slot)
        self.written = max(self.written, len(self.rows))

    def remove(self, slot: int) -> None:
        """Take a row out; the last one takes its place."""
        at, last = self.rows.index(slot), len(self.rows) - 1
        if at < last:
            # Computed first: a slab that something has yet to read is copied as a whole when it is written.
            moved = [mx.contiguous(array[last : last + 1]) for array in self.arrays()]
            mx.eval(moved)
            for array, row in zip(self.arrays(), moved, strict=True):
                array[at : at + 1] = row
            mx.eval(list(self.arrays()))
            self.rows[at] = self.rows[last]
        self.rows.pop()


class Slabs:
    """The state of all slots. Thread: the executor's."""

    def __init__(self, specs: Sequence[StateSpec]) -> None:
        self.specs = tuple(specs)
        self._classes: dict[int, ClassSlab] = {}
        self._class_of: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(slab.nbytes for slab in self._classes.values())

    def arrays(self) -> list[mx.array]:
        """All arrays, to be evaluated together with a step that wants no logits."""
        return [array for slab in self._classes.values() for array in slab.arrays()]

    def place(self, slot: int, tokens: int) -> ClassSlab:
        """Give a slot a place with room for so many tokens, moving what it holds; the class it is in."""
        wanted = max(class_capacity(tokens), self._class_of.get(slot, 0))
        if (now := self._class_of.get(slot)) == wanted:
            return self._classes[wanted]
        target = self._with_room(wanted)
        target.append(slot)
        if now is not None:
            self._copy(self._classes[now], self._classes[now].rows.index(slot), target, len(target.rows) - 1)
            self._remove(slot)
        self._class_of[slot] = wanted
        return target

    def find(self, slot: int) -> tuple[ClassSlab, int]:
        """The class that a slot's row is in, and its place there."""
        slab = self._classes[self._class_of[slot]]
        return slab, slab.rows.index(slot)

    def holds(self, slot: int) -> bool:
        """Whether a slot has a place."""
        return slot in self._class_of

    def release(self, slot: int) -> None:
        """Let a slot's place go; a class without rows goes as a whole. Idempotent."""
        if slot in self._class_of:
            self._remove(slot)

    def _with_room(self, capacity: int) -> ClassSlab:
        """The class, with room for one more row. Rooms double, so that a row that joins seldom moves others."""
        slab = self._classes.get(capacity)
        if slab is None:
            slab = self._classes[capacity] = ClassSlab(capacity, [*self._zeros(capacity, 1)])
        elif len(slab.rows) == slab.room:
            # One layer after another, so that no more than one is held twice.
            for layer, more in zip(slab.layers, self._zeros(capacity, slab.room), strict=True):
                layer[:] = [mx.concatenate([old, new]) for old, new in zip(layer, more, strict=True)]
                mx.eval(layer)
        return slab

    def _zeros(self, capacity: int, rows: int) -> Iterator[list[mx.array]]:
        """Each layer's arrays of so many empty places."""
        for spec in self.specs:
            yield spec.zeros(rows, capacity)

    def _copy(self, source: ClassSlab, at: int, target: ClassSlab, to: int) -> None:
        for spec, old, new in zip(self.specs, source.layers, target.layers, strict=True):
            for array, wider in zip(old, new, strict=True):
                if isinstance(spec, RecurrentSpec):
                    wider[to : to + 1] = array[at : at + 1]
                else:
                    wider[to : to + 1, :, : array.shape[2]] = array[at : at + 1]
        mx.eval(list(target.arrays()))

    def _remove(self, slot: int) -> None:
        """Take a row out of its class."""
        slab = self._classes[self._class_of.pop(slot)]
        slab.remove(slot)
        if not slab.rows:
            del self._classes[slab.capacity]
