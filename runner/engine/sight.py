"""Sight: where the pictures of a row stand among its tokens, and what follows from that for its steps.

Owns the arithmetic of places; refuses to know what is in a picture. In a row's tokens each place holds a negative
number made of the picture's content, so that whatever compares tokens tells pictures apart: two agree in some places
running only if they are the same. An executor is told the model's filler there instead, and beside it whose rows stand
where. A sight never changes; a row that loses tokens gets another.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from models.executors.base import EncodedPicture, Row, Span
from models.vision import PLACE, Prepared, Vision
from models.vision.positions import Position, positions_of

FLOAT32_BYTES = 4
_CODE_BITS = 62
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive places of a picture."""

    offset: int
    """The first, counted from the expansion's first token."""
    first_row: int
    """The tower's row that stands there."""
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPicture:
    """A picture of a request, made ready once, however often the prompt refers to it."""

    prepared: Prepared
    digest: bytes
    """Of all that the tower is given, and of the expansion."""
    tokens: tuple[int, ...]
    """The expansion, with a negative number of the digest's in each place."""
    stretches: tuple[Stretch, ...]

    @property
    def rows(self) -> int:
        """The rows of the tower that it takes."""
        return sum(stretch.length for stretch in self.stretches)


def identified(prepared: Prepared) -> PreparedPicture:
    """A picture with what tells it from others. Thread: any."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(repr((prepared.expansion, prepared.grid, len(prepared.passes))).encode())
    for given in prepared.passes:
        for name, array in sorted(given.items()):
            digest.update(repr((name, array.shape, array.dtype.str)).encode())
            digest.update(array.tobytes())
    own = digest.digest()
    codes = iter(_codes(own, prepared.expansion.count(PLACE)))
    tokens = tuple(next(codes) if token == PLACE else token for token in prepared.expansion)
    return PreparedPicture(prepared, own, tokens, tuple(_stretches(prepared.expansion)))


def _codes(digest: bytes, count: int) -> list[int]:
    """Negative numbers, one a place, no two places alike."""
    words = struct.unpack(f"<{count}q", hashlib.shake_256(digest).digest(8 * count))
    return [-1 - (word & (1 << _CODE_BITS) - 1) for word in words]


def _stretches(expansion: Sequence[int]) -> Iterator[Stretch]:
    begin = rows = 0
    for place in range(len(expansion) + 1):
        if place == len(expansion) or expansion[place] != PLACE:
            if place > begin:
                yield Stretch(begin, rows, place - begin)
                rows += place - begin
            begin = place + 1


@dataclass(frozen=True, slots=True, eq=False)
class PlacedPicture:
    """A picture whose expansion begins at a token of a row."""

    begin: int
    picture: PreparedPicture

    @property
    def end(self) -> int:
        """The first token behind its expansion."""
        return self.begin + len(self.picture.tokens)


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive places of a picture in a row: tokens [begin, end)."""

    begin: int
    end: int
    first_row: int
    picture: PreparedPicture


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """The pictures of one row, in their order. Thread: any."""

    vision: Vision
    pictures: tuple[PlacedPicture, ...]
    _runs: tuple[_Run, ...] = field(init=False)
    _positions: tuple[Position, ...] = field(init=False)
    """Of all tokens up to the last picture's last place; empty where positions have no axes."""
    shift: int = field(init=False)
    """What is added to the place of a token behind all pictures to give its position."""
    held_bytes: int = field(init=False)
    """What the pictures take as they were made ready."""
    needed_bytes: int = field(init=False)
    """What looking at them takes: the rows, and the largest pass."""

    def __post_init__(self) -> None:
        """Find what follows from the pictures, once."""
        runs = [
            _Run(begin, begin + stretch.length, stretch.first_row, placed.picture)
            for placed in self.pictures
            for stretch in placed.picture.stretches
            for begin in (placed.begin + stretch.offset,)
        ]
        grids = [(run.begin, run.picture.prepared.grid) for run in runs]
        known = [(begin, grid) for begin, grid in grids if grid is not None]
        positions, shift = positions_of(runs[-1].end, known) if known else ((), 0)
        held = sum(picture.prepared.nbytes for picture in self.distinct)
        found = {"_runs": tuple(runs), "_positions": positions, "shift": shift, "held_bytes": held}
        for name, value in (found | {"needed_bytes": self._needed()}).items():
            object.__setattr__(self, name, value)

    @property
    def distinct(self) -> list[PreparedPicture]:
        """Each picture once."""
        return list({placed.picture.digest: placed.picture for placed in self.pictures}.values())

    @property
    def end(self) -> int:
        """The first token behind the last place."""
        return self._runs[-1].end if self._runs else 0

    def whole(self, place: int) -> int:
        """The last token up to `place` in front of which a row may be divided: none looks ahead over it."""
        run = self._divided(place)
        return place if run is None else run.begin

    def chunk_end(self, begin: int, end: int) -> int:
        """Where a chunk of the tokens [begin, end) ends, so that it has no part of a run that looks both ways.

        It ends before such a run, or behind it if it begins there.
        """
        run = self._divided(end)
        if run is None:
            return end
        return run.begin if run.begin > begin else run.end

    def long_runs(self, length: int) -> tuple[int, ...]:
        """Where runs that look both ways and are longer than that begin."""
        if self.vision.longest_run is None:
            return ()
        return tuple(run.begin for run in self._runs if run.end - run.begin > length)

    def looked_at(self, begin: int, end: int) -> list[PreparedPicture]:
        """The pictures of which tokens [begin, end) have places, each once."""
        return list({run.picture.digest: run.picture for run in self._within(begin, end)}.values())

    def row(
        self, slot: int, begin: int, tokens: Sequence[int], wanted: int, seen: Mapping[bytes, EncodedPicture]
    ) -> Row:
        """What an executor is told of a row that runs `tokens` from `begin` on.

        Args:
            slot: the row's.
            begin: the first token's place.
            tokens: as the row has them; empty for the one that nobody has read yet.
            wanted: of how many logits are wanted.
            seen: what the tower made of pictures, by their digests.
        """
        if begin >= self.end:
            return Row(slot, begin, tuple(tokens), wanted, shift=self.shift)
        end = begin + len(tokens)
        runs = list(self._within(begin, end))
        return Row(
            slot,
            begin,
            tuple(self.vision.filler if token < 0 else token for token in tokens),
            wanted,
            shift=0 if runs else self._shift_at(begin),
            positions=self._positions_within(begin, end) if runs else (),
            spans=tuple(_span(run, begin, end, seen[run.picture.digest]) for run in runs),
            runs=() if self.vision.longest_run is None else tuple((run.begin - begin, run.end - begin) for run in runs),
        )

    def outside(self, place: int, *, ahead: bool) -> int:
        """`place`, or if it is within a picture's expansion that one's end (`ahead`) or begin."""
        for placed in self.pictures:
            if placed.begin < place < placed.end:
                return placed.end if ahead else placed.begin
        return place

    def without(self, begin: int, end: int) -> "Sight":
        """As it is when the row has lost its tokens [begin, end), which divide no expansion."""
        before = [placed for placed in self.pictures if placed.end <= begin]
        behind = [
            PlacedPicture(placed.begin - (end - begin), placed.picture)
            for placed in self.pictures
            if placed.begin >= end
        ]
        return Sight(self.vision, (*before, *behind))

    def _needed(self) -> int:
        tower = self.vision.tower
        rows = sum(picture.rows for picture in self.distinct) * tower.width * (1 + tower.deep) * FLOAT32_BYTES
        return rows + max((tower.working_bytes(picture.prepared.patches) for picture in self.distinct), default=0)

    def _divided(self, place: int) -> _Run | None:
        """The run that looks both ways and that `place` is within."""
        if self.vision.longest_run is None:
            return None
        return next((run for run in self._runs if run.begin < place < run.end), None)

    def _within(self, begin: int, end: int) -> Iterator[_Run]:
        return (run for run in self._runs if run.begin < end and run.end > begin)

    def _shift_at(self, place: int) -> int:
        """What is added to the place of a text token to give its position."""
        return self._positions[place][0] - place if place < len(self._positions) else self.shift

    def _positions_within(self, begin: int, end: int) -> tuple[Position, ...]:
        known = self._positions
        if not known:
            return ()
        behind = range(max(begin, len(known)), end)
        return (*known[begin:end], *((place + self.shift,) * 3 for place in behind))


def _span(run: _Run, begin: int, end: int, encoded: EncodedPicture) -> Span:
    first, last = max(run.begin, begin), min(run.end, end)
    row = run.first_row + first - run.begin
    return Span(first - begin, encoded, row, row + last - first)
