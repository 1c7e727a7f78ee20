"""Learned positions of a square that is stretched over a picture: each patch has shares of the four around it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.arch.base import Tensor
from models.ops import Embedding
from models.ops.vision import TowerOps
from models.vision.base import Given
from models.vision.processing import Floats

Whole = npt.NDArray[np.int64]
CORNERS = tuple(divmod(number, 2) for number in range(4))
"""Each by whether it is the lower and the right one."""


def given(rows: Sequence[Whole], columns: Sequence[Whole], shares: Sequence[Floats], side: int) -> Given:
    """What a tower is given of each corner.

    Shapes: two rows, two columns (T,) each, of corners within a square of `side`; four shares (T,). Int64 (T,) and
    float32 (T, 1) each.
    """
    made = {f"corner.{n}": rows[down] * side + columns[right] for n, (down, right) in enumerate(CORNERS)}
    return made | {f"share.{n}": share.astype(np.float32)[:, None] for n, share in enumerate(shares)}


def between(exact: Floats, side: int) -> Given:
    """The same of places in the square, rows and columns in its own units, none below 0. Shapes: exact (T, 2)."""
    lower = np.floor(exact)
    upper = exact - lower
    near = [np.minimum(lower.astype(np.int64) + step, side - 1) for step in (0, 1)]
    part = (1 - upper, upper)
    shares = [part[down][:, 0] * part[right][:, 1] for down, right in CORNERS]
    return given([each[:, 0] for each in near], [each[:, 1] for each in near], shares, side)


def added(ops: TowerOps[Tensor], x: Tensor, table: Embedding) -> Tensor:
    """The tokens with their positions. Shapes: x (T, width); returns the same."""
    for number in range(len(CORNERS)):
        learned = ops.look_up(table, f"corner.{number}")
        x = ops.add(x, ops.mul(learned, ops.given(f"share.{number}", 1)))
    return x
