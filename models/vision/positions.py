"""Where the tokens of a row stand along three axes, when pictures are among them.

Source: M-RoPE, Qwen2-VL (arXiv 2409.12191); transformers' `get_rope_index` for what follows a picture.
"""

from collections.abc import Sequence
from typing import TypeAlias

Position: TypeAlias = tuple[int, int, int]
"""Time, height and width."""


def positions_of(length: int, runs: Sequence[tuple[int, tuple[int, int]]]) -> tuple[tuple[Position, ...], int]:
    """The positions of a row's first `length` tokens, and what the next token's position is less its place.

    Text counts on along all axes at once. The places of a picture share one time and have a row and a column from
    there on; what follows goes on behind the longer side. Thread: any.

    Args:
        length: the tokens.
        runs: of each picture its first place and its rows and columns, in order, all of it within the tokens.

    Returns:
        The positions, one for each token, and the shift: 0 where there is no picture.

    Raises:
        ValueError: the runs overlap, are out of order or leave the row.
    """
    positions: list[Position] = []
    shift = 0
    for first, (rows, columns) in runs:
        if first < len(positions) or first + rows * columns > length:
            raise ValueError(f"a picture of {rows} x {columns} places cannot begin at {first} of {length} tokens")
        positions += _text(len(positions), first, shift)
        start = first + shift
        positions += [(start, start + row, start + column) for row in range(rows) for column in range(columns)]
        shift += max(rows, columns) - rows * columns
    positions += _text(len(positions), length, shift)
    return tuple(positions), shift


def _text(begin: int, end: int, shift: int) -> list[Position]:
    return [(place + shift,) * 3 for place in range(begin, end)]
