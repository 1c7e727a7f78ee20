"""How a value's or a weight's axis lies on the ranks: spans, each of them whole everywhere or cut into pieces.

An axis is not always cut in one: of queries, keys and values that lie side by side each rank has its heads of all
three, and of the keys perhaps fewer heads than there are ranks, so that neighbours hold the same one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]
"""Places [begin, end) of an axis."""


@dataclass(frozen=True, slots=True)
class Span:
    """Some neighbouring places of an axis, in equal pieces."""

    width: int
    pieces: int = 1
    """Rank r of n has piece r * pieces // n; 1: every rank has all of it. The last piece may be shorter."""

    @property
    def local(self) -> int:
        """Places that each rank has, those that pad the last piece among them."""
        return -(-self.width // self.pieces)

    def range(self, rank: int, ranks: int) -> Range:
        """The rank's places; the last piece's end where the axis ends."""
        piece = rank * self.pieces // ranks
        return min(piece * self.local, self.width), min((piece + 1) * self.local, self.width)


Layout: TypeAlias = tuple[Span, ...]


def whole(width: int) -> Layout:
    """Every rank has all of it."""
    return (Span(width),)


def cut(width: int, pieces: int) -> Layout:
    """One span in so many pieces."""
    return (Span(width, pieces),)


def is_whole(layout: Layout) -> bool:
    """Whether every rank has all of it."""
    return all(span.pieces == 1 for span in layout)


def local_width(layout: Layout) -> int:
    """Places that each rank has."""
    return sum(span.local for span in layout)


def joined(parts: Sequence[Layout]) -> Layout:
    """The layout of axes that lie one behind the other; spans that are whole become one."""
    spans: list[Span] = []
    for span in (span for layout in parts for span in layout):
        if spans and spans[-1].pieces == span.pieces == 1:
            spans[-1] = Span(spans[-1].width + span.width)
        else:
            spans.append(span)
    return tuple(spans)


def divided(layout: Layout, sizes: Sequence[int]) -> list[Layout] | None:
    """The layouts of neighbouring parts of an axis; None where a part's end falls into a span that is cut."""
    parts: list[Layout] = []
    spans = list(layout)
    for size in sizes:
        own: list[Span] = []
        left = size
        while left:
            first = spans.pop(0)
            if first.width > left:
                if first.pieces > 1:
                    return None
                spans.insert(0, Span(first.width - left))
                first = Span(left)
            own.append(first)
            left -= first.width
        parts.append(joined([tuple(own)]))
    return parts


def ranges(layout: Layout, rank: int, ranks: int) -> list[Range]:
    """The rank's places in the whole axis, span by span. An uneven span's are fewer than `local` on the last ranks."""
    found: list[Range] = []
    start = 0
    for span in layout:
        begin, end = span.range(rank, ranks)
        found.append((start + begin, start + end))
        start += span.width
    return found


def local_ranges(layout: Layout) -> Iterator[tuple[Span, int]]:
    """Each span with the place among a rank's own where it begins."""
    start = 0
    for span in layout:
        yield span, start
        start += span.local
