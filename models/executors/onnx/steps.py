"""From rows to the arrays that a graph is given for a run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from models.executors.base import Row
from models.executors.onnx import delta_scan, scan
from models.executors.onnx.recurrent import ENDS, RUN, TOKENS, at_once_input, kept_input, tap_input

Array = npt.NDArray[Any]

TOGETHER = 16
"""Rows of up to so many tokens run in one pass; a longer one has a pass of its own."""
ROUNDING = 256
"""The bound of the rows' lengths is rounded up to this: scores are allocated for it."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that run in one pass: the slots [first, end), and the rows' places among them."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> int:
        """The lowest slot."""
        return min(row.slot for row in self.rows)

    @property
    def end(self) -> int:
        """The slot behind the highest."""
        return max(row.slot for row in self.rows) + 1

    @property
    def longest(self) -> int:
        """Tokens of the longest row, or 2: with one place the kernel would sum in another order than with several."""
        return max(2, *(row.length for row in self.rows))

    @property
    def reach(self) -> int:
        """A position that no token of the run reaches, padding and those that are run twice included."""
        return max(row.begin for row in self.rows) + self.longest


def runs(rows: Sequence[Row], *, by_slot: bool = False) -> Iterator[Run]:
    """The passes that a step's rows need, in their order, or those of a pass by slot, as recurrent layers want them."""
    short = tuple(row for row in rows if row.length <= TOGETHER and not row.runs)
    if by_slot:
        short = tuple(sorted(short, key=lambda row: row.slot))
    if short:
        yield Run(short)
    for row in rows:
        if row.length > TOGETHER or row.runs:
            yield Run((row,))


def arrays(run: Run, *, capacity: int, even: bool = False, twice: bool = False, spare: int = 0) -> dict[str, Array]:
    """The step's inputs by name; see `attention.STEP_INPUTS`. Thread: the executor's.

    Args:
        run: what runs.
        capacity: tokens that a slot has room for.
        even: run and want an even number of tokens; the last one is repeated, to no effect.
        twice: attention without a window looks twice for a row of one token, at its place and behind it.
        spare: rows of the tables of rotations that are for positions with several axes.
    """
    rows, count = run.rows, run.end - run.first
    longest = run.longest
    starts = [0, *accumulate(row.length for row in rows)]
    pad = np.zeros((count, longest), np.int64)
    last, valid = np.zeros((2, count), np.int32)
    last_once, valid_once = np.zeros((2, count), np.int32)
    unpad: list[tuple[int, int]] = []
    wanted: list[int] = []
    turned: list[int] = []
    explicit = 0
    for row, start in zip(rows, starts, strict=False):
        place, length = row.slot - run.first, row.length
        pad[place, :length] = np.arange(start, start + length)
        looks = max(length, 2) if twice else length
        pad[place, length:looks] = start
        valid[place], last[place] = looks, row.begin + looks - 1
        valid_once[place], last_once[place] = length, row.begin + length - 1
        unpad += [(place, token) for token in range(length)]
        wanted += range(start + length - row.wanted, start + length)
        if row.positions:
            turned += range(explicit, explicit + length)
            explicit += length
        else:
            turned += range(spare + row.begin + row.shift, spare + row.begin + row.shift + length)
    wanted = wanted or [starts[-1] - 1]
    wanted += wanted[-1:] * (even and len(wanted) % 2)
    extra = even and len(unpad) % 2
    unpad = unpad + unpad[-1:] * extra
    rotations = np.array(turned + turned[-1:] * extra, np.int64)
    bound = min(-(-run.reach // ROUNDING) * ROUNDING, capacity)
    return {
        "pad": pad,
        "unpad": np.array(unpad, np.int64),
        "last": last,
        "valid": valid,
        "last.window": last_once,
        "valid.window": valid_once,
        "total": np.array(bound, np.int32),
        "wanted": np.array(wanted, np.int64),
        "positions": rotations[None],
        "places": rotations[pad],
        "past": np.array([max(1, *(row.begin for row in rows))], np.int64),
    }


def positions(run: Run, tokens: int) -> Array:
    """The places of a run's tokens in their rows, the last once more if need be. Shapes: (tokens,)."""
    places = [place for row in run.rows for place in range(row.begin, row.begin + row.length)]
    return np.array(places + places[-1:] * (tokens - len(places)), np.int64)


def recurrent_arrays(run: Run, taps: Iterable[int], tokens: int) -> dict[str, Array]:
    """The inputs of recurrent layers; see `recurrent`. Thread: the executor's.

    Args:
        run: what runs, its rows in the order of their slots.
        taps: the lengths of convolutions.
        tokens: what is run: the rows' tokens, and perhaps the last one once more.
    """
    lengths = np.zeros(run.end - run.first, np.int64)
    for row in run.rows:
        lengths[row.slot - run.first] = row.length
    ends = np.append(0, np.cumsum(lengths))
    inputs: dict[str, Array] = {
        ENDS: ends.astype(np.int32),
        TOKENS: ends[-1:],
        RUN: np.array([tokens], np.int64),
        delta_scan.PADS: np.array([0, 0, 0, max(delta_scan.MOST_TOKENS - ends[-1], 0), 0, 0], np.int64),
    }
    for most in (scan.MOST_TOKENS, delta_scan.MOST_TOKENS):
        inputs[at_once_input(most)] = np.array(len(run.rows) == 1 and TOGETHER < ends[-1] <= most)
    for count in taps:
        picked, kept = _taps(ends, count)
        extra = tokens - ends[-1]
        inputs[kept_input(count)] = kept
        for number in range(count - 1):
            inputs[tap_input(count, number)] = np.append(picked[number], picked[number, -1:].repeat(extra))
    return inputs


def _taps(ends: Array, taps: int) -> tuple[Array, Array]:
    """What a convolution reads of its states (B * (taps - 1) of them) and the tokens behind them, and what it keeps.

    Shapes: int64 (taps - 1, T) and (B, taps - 1).
    """
    earlier, slots = taps - 1, len(ends) - 1
    picked, kept = [], []
    for slot, (begin, end) in enumerate(pairwise(ends)):
        held = np.arange(slot * earlier, (slot + 1) * earlier)
        order = np.concatenate([held, np.arange(begin, end) + slots * earlier])
        picked.append(np.stack([order[number : number + end - begin] for number in range(earlier)]))
        kept.append(order[end - begin :])
    return np.concatenate(picked, axis=1), np.stack(kept)


def chunked(run: Run, length: int, total: int) -> Array:
    """What keeps each query to its own run of `length` tokens. Shapes: float32 (slots, 1, longest, total)."""
    added = np.zeros((run.end - run.first, 1, run.longest, total), np.float32)
    of_key, places = np.arange(total) // length, np.arange(run.longest)[:, None]
    for row in run.rows:
        added[row.slot - run.first, 0][of_key != (row.begin + places) // length] = -np.inf
    return added


def cells(run: Run, heads: int, capacity: int, tokens: int) -> Array:
    """Where the keys of so many tokens, the last once more if need be, go in a slab (slots, heads, capacity).

    Shapes: int64 (tokens * heads, 1).
    """
    places = np.concatenate(
        [
            (row.slot * heads + np.arange(heads)) * capacity + np.arange(row.begin, row.begin + row.length)[:, None]
            for row in run.rows
        ]
    )
    return np.append(places, places[-1:].repeat(tokens - len(places), axis=0)).reshape(-1, 1)
