"""Which arrays hold a layer's state, from its declaration: names, widths, windows, and what a row takes of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from models.errors import QuantizationError
from models.ops import KV, LayerState, Recurrent

CacheType: TypeAlias = Literal["f16", "q8_0", "q4_0"]
"""How keys and values are held, by Ollama's names; f16 is not quantised: float32 here."""

HEAD_STEP = 16
"""The attention kernel wants heads of a multiple of so many dimensions; others are filled up with zeros."""
WINDOW_SLACK = 256
"""Tokens that a windowed slab holds beyond its window before it moves."""
GROUP = 32
"""Values of a quantised cache that share a scale and an offset, as in llama.cpp's types of these names."""
_BITS = {"q8_0": 8, "q4_0": 4}
_PAGE = 4096
_FLOAT, _BYTE = np.dtype(np.float32), np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class SlabSpec:
    """One array of a layer's state. Shapes: (slots, heads, capacity, width)."""

    name: str
    layer: int
    heads: int
    width: int
    dtype: np.dtype[Any]
    window: int | None
    flat: bool = False
    """A graph writes it by cells."""
    stands_for: str = ""
    """Another array that this one is as well: values that are keys."""

    def capacity(self, longest: int) -> int:
        """Tokens that there is room for, where a row has `longest` at most."""
        return longest if self.window is None else self.window + WINDOW_SLACK - 1

    def held(self, tokens: int) -> int:
        """Tokens that are held of a row of so many: all, or those of a window that moves by its slack at a time."""
        capacity = self.capacity(tokens)
        return tokens if tokens <= capacity else tokens - WINDOW_SLACK * -(-(tokens - capacity) // WINDOW_SLACK)

    def room(self, tokens: int) -> int:
        """Tokens that may follow so many before the window moves, so that they may be taken back."""
        if self.window is None:
            return WINDOW_SLACK
        capacity = self.capacity(tokens)
        return capacity - tokens if tokens <= capacity else -(tokens - capacity) % WINDOW_SLACK

    def nbytes(self, tokens: int) -> int:
        """What a row takes: whole pages a head, and the place behind the last token that is written as well."""
        per_head = min(tokens + 1, self.capacity(tokens + 1)) * self.width * self.dtype.itemsize
        return self.heads * (-(-per_head // _PAGE) * _PAGE)


def slab_specs(state: KV, layer: int, cache_type: CacheType) -> list[SlabSpec]:
    """The arrays of a layer's state. Thread: any.

    A quantised cache of a windowed layer holds all tokens.

    Raises:
        QuantizationError: the heads cannot be held so.
    """
    parts = (("k", state.key_dim), ("v", state.value_dim))
    if state.values_in_keys:
        if cache_type != "f16":
            raise QuantizationError(f"latents are not held as {cache_type}; choose the cache type f16")
        return [SlabSpec(f"k.{layer}", layer, 1, _filled_up(state.key_dim), _FLOAT, None, stands_for=f"v.{layer}")]
    if cache_type == "f16":
        return [
            SlabSpec(f"{part}.{layer}", layer, state.heads, _filled_up(dim), _FLOAT, state.window)
            for part, dim in parts
        ]
    specs: list[SlabSpec] = []
    for part, dim in parts:
        if dim % GROUP:
            raise QuantizationError(
                f"a {cache_type} cache needs heads of a multiple of {GROUP} dimensions, and this model's have "
                f"{dim}; choose the cache type f16"
            )
        widths = (("codes", dim * _BITS[cache_type] // 8, _BYTE), ("scales", dim // GROUP, _FLOAT))
        for kind, width, dtype in (*widths, ("offsets", dim // GROUP, _FLOAT)):
            specs.append(SlabSpec(f"{part}.{layer}.{kind}", layer, state.heads, width, dtype, None, flat=True))
    return specs


def _filled_up(dim: int) -> int:
    return -(-dim // HEAD_STEP) * HEAD_STEP


def state_nbytes(specs: Iterable[SlabSpec], tokens: int) -> int:
    """The bytes that one row of so many tokens takes. Thread: any."""
    return sum(spec.nbytes(tokens) for spec in specs)


def layer_nbytes(state: LayerState, layer: int, cache_type: CacheType, tokens: int) -> int:
    """What one row of so many tokens takes of a layer's state. Thread: any. Raises QuantizationError."""
    if isinstance(state, Recurrent):
        return recurrent_nbytes(state) if tokens else 0
    return state_nbytes(slab_specs(state, layer, cache_type), tokens)


def recurrent_nbytes(state: Recurrent) -> int:
    """The bytes of one row's array."""
    return _FLOAT.itemsize * math.prod(state.shape)
