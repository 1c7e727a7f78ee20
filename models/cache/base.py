"""The one protocol that every kind of layer cache implements."""

from typing import Protocol, Self

import mlx.core as mx


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
