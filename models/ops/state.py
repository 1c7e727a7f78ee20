"""State as an architecture declares it: what each layer remembers of a row.

Sizing, prefix cache, disk cache and admission work from these declarations. Keys and values are divisible by tokens;
what a recurrent layer remembers is not: going back to an earlier token needs a checkpoint that was taken there.
"""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class KV:
    """Keys (heads, tokens, key_dim) and values (heads, tokens, value_dim) of all tokens, or of the last `window`."""

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    """A query sees itself and the `window - 1` tokens before it; None: all of them."""
    values_in_keys: bool = False
    """Values are the beginnings of the keys, and not held by themselves."""


@dataclass(frozen=True, slots=True)
class Recurrent:
    """One array of float32, overwritten by every token: zeros for a row that has none. Shape: as it says."""

    shape: tuple[int, ...]


LayerState: TypeAlias = KV | Recurrent
