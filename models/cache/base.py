"""The one protocol that every kind of layer cache implements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Segment:
    """What a layer remembers of some consecutive tokens, taken out of a row.

    Its arrays are what the cache that gave it holds, in the cache's own order and form (plain or packed), all with
    the tokens along one axis. Shapes: each (1, H_kv, L, any).
    """

    arrays: tuple[mx.array, ...]

    @property
    def length(self) -> int:
        """Its tokens."""
        return int(self.arrays[0].shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.arrays)

    def part(self, begin: int, end: int) -> "Segment":
        """A copy of the tokens [begin, end) of this segment."""
        return Segment(tuple(mx.contiguous(array[:, :, begin:end]) for array in self.arrays))


@dataclass(frozen=True, slots=True)
class SeenOnHost:
    """Where a BLAS finds what queries may look at, until the cache is used again. Shapes: float32 (H_kv, S, D)."""

    keys: int
    """The address of the first one."""
    values: int
    tokens: int
    """S"""
    stride: int
    """Bytes from one head to the next."""
    held: tuple[npt.NDArray[np.float32], ...] = ()
    """Whatever must live until all was read."""


class LayerCache(Protocol):
    """What one layer remembers of one row. Thread: the MLX thread.

    `offset` is how many tokens of the row have passed: the position of the next one.
    """

    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        ...

    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate together with a step."""
        ...

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append L tokens' keys and values (1, H_kv, L, D); what their queries may look at (1, H_kv, S, D)."""
        ...

    def snapshot(self) -> Self:
        """An independent copy of the present state; costs no copy until one of the two is written."""
        ...

    @property
    def first(self) -> int:
        """The position of the oldest token still held."""
        ...

    def segment(self, begin: int, end: int) -> Segment:
        """A copy of the tokens at positions [begin, end); `first <= begin`, `end <= offset`."""
        ...

    def restore(self, segments: Sequence[Segment]) -> None:
        """Fill an empty cache with the row's first tokens, stored earlier."""
        ...

    def trim(self, tokens: int) -> None:
        """Forget the newest tokens again; not more than the last `update` appended, less one."""
        ...
