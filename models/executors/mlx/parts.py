"""From a step's rows to parts: rows of one class and one length, which every layer runs as one operation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from models.executors.base import Row
from models.executors.mlx.slabs import ClassSlab, Slabs
from models.ops import Attention


@dataclass(slots=True)
class Part:
    """Rows that run the same number of tokens in one class. Shapes: places and begins (B,)."""

    slab: ClassSlab
    rows: tuple[Row, ...]
    places: list[int]
    start: int
    """The first of its tokens among the step's."""
    begins: mx.array = field(init=False)
    positions: mx.array = field(init=False)
    """Of each token. Shape: int32 (B, L)."""
    indices: mx.array = field(init=False)
    """The rows' places. Shape: int32 (B, 1)."""
    taken: slice | mx.array | None = field(init=False)
    """The same to take the rows out of a slab: None for all of it, a slice of neighbours, else int32 (B,)."""
    offsets: mx.array = field(init=False)
    """What each row's rotations begin at. Shape: int32 (B,)."""
    axes: mx.array | None = field(init=False)
    """The positions of each token along three axes, where some row says them. Shape: float32 (B, L, 3)."""
    _masks: dict[tuple[int, int | None, int | None, bool], mx.array] = field(default_factory=dict)
    _cells: dict[int, mx.array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begins = mx.array([row.begin for row in self.rows], dtype=mx.int32)
        self.positions = self.begins[:, None] + mx.arange(self.length, dtype=mx.int32)
        places, first, count = mx.array(self.places, dtype=mx.int32), self.places[0], len(self.places)
        self.indices = places[:, None]
        self.taken = slice(first, first + count) if self.places == [*range(first, first + count)] else places
        if count == self.slab.room:
            self.taken = None
        shifts = [row.shift for row in self.rows]
        self.offsets = self.begins + mx.array(shifts, dtype=mx.int32) if any(shifts) else self.begins
        said = any(row.positions for row in self.rows)
        self.axes = mx.array([_axes(row) for row in self.rows], dtype=mx.float32) if said else None

    @property
    def length(self) -> int:
        """L, the tokens of each row."""
        return self.rows[0].length

    @property
    def tokens(self) -> slice:
        """Its tokens among the step's."""
        return slice(self.start, self.start + len(self.rows) * self.length)

    def cells(self, capacity: int) -> mx.array:
        """Where each token's keys and values lie in a slab of that capacity. Shape: int32 (B, L)."""
        if capacity not in self._cells:
            self._cells[capacity] = self.positions % capacity
        return self._cells[capacity]

    def mask(self, capacity: int, spec: Attention) -> mx.array:
        """Where each token may look. Shape: bool (B, 1, L, capacity).

        Place j of a ring holds the newest position p with p % capacity = j; a slab that is not one is a ring that has
        not come round.
        """
        two_way = spec.two_way and any(row.runs for row in self.rows)
        key = (capacity, spec.window, spec.chunk, two_way)
        if key not in self._masks:
            last = self.begins[:, None, None] + (self.length - 1)
            held = last - (last - mx.arange(capacity, dtype=mx.int32)) % capacity
            queries = self.positions[:, :, None]
            mask = (held >= 0) & (held <= queries)
            if two_way:
                mask = mask | self._within_runs(held)
            if spec.window is not None:
                mask = mask & (held > queries - spec.window)
            if spec.chunk is not None:
                mask = mask & (held // spec.chunk == queries // spec.chunk)
            self._masks[key] = mask[:, None]
        return self._masks[key]

    def _within_runs(self, held: mx.array) -> mx.array:
        """Which keys are in a query's run. Shapes: held (B, 1, capacity), the places' positions; (B, L, capacity)."""
        runs = mx.array([_runs(row) for row in self.rows], dtype=mx.int32)
        own = held[:, 0] - self.begins[:, None]
        inside = mx.take_along_axis(runs, mx.clip(own, 0, self.length - 1), axis=1)
        inside = mx.where(own >= 0, inside, 0)
        return (runs[:, :, None] > 0) & (runs[:, :, None] == inside[:, None])


def _axes(row: Row) -> Sequence[tuple[int, int, int]]:
    """The positions of a row's tokens along three axes."""
    begin = row.begin + row.shift
    return row.positions or [(place, place, place) for place in range(begin, begin + row.length)]


def _runs(row: Row) -> list[int]:
    """Of each of a row's tokens the number of its run from 1 on; 0: it is in none."""
    numbers = [0] * row.length
    for number, (begin, end) in enumerate(row.runs, 1):
        numbers[begin:end] = [number] * (end - begin)
    return numbers


def parts_of(rows: Sequence[Row], slabs: Slabs) -> list[Part]:
    """Place the rows and sort them into parts, those of a part by place. A row that begins anew has a new place."""
    for row in rows:
        if row.begin == 0:
            slabs.release(row.slot)
        slabs.place(row.slot, row.begin + row.length)
    groups: dict[tuple[int, int], list[tuple[int, Row]]] = {}
    found: dict[int, ClassSlab] = {}
    for row in rows:
        slab, place = slabs.find(row.slot)
        found[slab.capacity] = slab
        groups.setdefault((slab.capacity, row.length), []).append((place, row))
    parts, start = [], 0
    for (capacity, length), group in groups.items():
        group.sort(key=lambda pair: pair[0])
        part = Part(found[capacity], tuple(row for _, row in group), [place for place, _ in group], start)
        parts.append(part)
        start += len(group) * length
    return parts
