"""Going back in recurrent layers, which cannot: before drafts a state is kept, and what proved right is run again.

What a row is told to run then begins earlier and is longer; who asked for it need not know. Shared by the executors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from models.executors.base import Row

MOST_REPLAYED = 8
"""Tokens that a step runs again beside its own; more of them have a pass before it."""

Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class _Mark(Generic[Kept]):
    """A slot's state before its last step, and what that step ran."""

    position: int
    tokens: tuple[int, ...]
    state: Kept


class Replays(Generic[Kept]):
    """Where each slot's recurrent state stands, and how it gets to where it shall. Thread: the executor's."""

    def __init__(self, save: Callable[[int], Kept], load: Callable[[int, Kept], None]) -> None:
        """`save` copies a slot's state, `load` puts a copy back."""
        self._save, self._load = save, load
        self._stands: dict[int, int] = {}
        self._marks: dict[int, _Mark[Kept]] = {}

    def stands(self, slot: int) -> int:
        """How many tokens a slot's state is of."""
        return self._stands.get(slot, 0)

    def passes(self, rows: Sequence[Row]) -> Iterator[tuple[Row, ...]]:
        """What is to be run for a step's rows: the last pass is all of them, in their order.

        Each must have been run before the next is asked for.
        """
        planned = [self._planned(row) for row in rows]
        late = tuple(
            replace(row, tokens=row.tokens[: row.length - own.length], wanted=0)
            for row, own in zip(planned, rows, strict=True)
            if row.length - own.length > MOST_REPLAYED
        )
        if late:
            yield late
            self._note(late)
            planned = [
                own if any(own.slot == each.slot for each in late) else row
                for row, own in zip(planned, rows, strict=True)
            ]
        for row in planned:
            self._mark(row)
        yield tuple(planned)
        self._note(planned)

    def restored(self, slot: int, tokens: int) -> None:
        """A slot's state was filled with that of so many tokens."""
        self._stands[slot] = tokens
        self._marks.pop(slot, None)

    def forget(self, slot: int) -> None:
        """A slot has no state. Idempotent."""
        self._stands.pop(slot, None)
        self._marks.pop(slot, None)

    def _planned(self, row: Row) -> Row:
        """The row, beginning where its state can stand."""
        if row.begin == 0:
            self.forget(row.slot)
        if row.begin == self.stands(row.slot):
            return row
        mark = self._marks[row.slot]
        assert row.tokens, "what was drawn behind drafts is known"
        assert not row.spans, "nobody drafts pictures"
        assert mark.position <= row.begin, "a recurrent layer was asked to go back further than to its last step"
        self._load(row.slot, mark.state)
        self._stands[row.slot] = mark.position
        again = mark.tokens[: row.begin - mark.position]
        return replace(row, begin=mark.position, tokens=(*again, *row.tokens))

    def _mark(self, row: Row) -> None:
        """Keep the state as it is before a row that may be taken back."""
        mark = self._marks.pop(row.slot, None)
        if row.wanted > 1 and row.begin > 0:
            kept = mark.state if mark is not None and mark.position == row.begin else self._save(row.slot)
            self._marks[row.slot] = _Mark(row.begin, row.tokens, kept)

    def _note(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._stands[row.slot] = row.begin + row.length
