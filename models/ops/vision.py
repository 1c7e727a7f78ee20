"""The operations of a vision tower: one pass over the patches of a picture, without state.

What follows from geometry alone (positions, angles, groups, order) is made on the host and *given* by name, so a tower
says what is done and a family's `prepare` says where. A pass's tokens are patches first, and then what is made of them.
"""

from typing import Protocol

from models.ops.base import Attention, Ops, Tensor
from models.ops.weights import Embedding, Vector


class TowerOps(Ops[Tensor], Protocol[Tensor]):
    """Operations on (T, …) values of one pass. Thread: the executor's."""

    def given(self, name: str, width: int) -> Tensor:
        """What the host gives, float32. Shapes: returns (T, width)."""
        ...

    def look_up(self, table: Embedding, name: str) -> Tensor:
        """The rows of a table that the host names. Shapes: given int64 (T,); returns (T, width)."""
        ...

    def take(self, x: Tensor, name: str) -> Tensor:
        """The tokens of `x` that the host names, in its order. Shapes: given int64 (N,); x (T, D); returns (N, D)."""
        ...

    def turn(self, x: Tensor, heads: int, name: str, *, interleaved: bool = False) -> Tensor:
        """Rotate each head by its token's angles, halves paired or neighbours.

        Shapes: given float32 (T, d / 2), radians; x (T, heads * d); returns the same.
        """
        ...

    def look_around(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention, groups: str = "") -> Tensor:
        """Attention to all tokens of a token's group, before and behind it; of `spec` the heads and the scale count.

        Without `groups` all tokens are one group; else the host gives the lengths of consecutive ones.

        Shapes: given int64 (G,), the sum T; q (T, heads * d), k and v (T, kv_heads * d); returns (T, heads * d).
        """
        ...

    def fold(self, x: Tensor, count: int, *, interleaved: bool = False) -> Tensor:
        """So many consecutive tokens as one, side by side; `interleaved`: of each feature the values side by side.

        Shapes: x (T, D), T a multiple of count; returns (T / count, count * D).
        """
        ...

    def pool(self, x: Tensor, count: int) -> Tensor:
        """The mean of each so many consecutive tokens. Shapes: x (T, D); returns (T / count, D)."""
        ...

    def clip(self, x: Tensor, least: Vector, most: Vector) -> Tensor:
        """Each value brought between two stored numbers. Shapes: x (T, D), both of width 1; returns the same."""
        ...
