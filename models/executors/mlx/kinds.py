"""The kinds of cache that a user can choose from, by Ollama's names. f16 is as the model computes."""

from typing import Literal, TypeAlias

CacheType: TypeAlias = Literal["f16", "q8_0", "q4_0"]
GROUP = 32
"""Values that share a scale and an offset, as in the types of llama.cpp whose names these have."""
_BITS: dict[CacheType, int] = {"q8_0": 8, "q4_0": 4}


def kind_bits(cache_type: CacheType) -> int | None:
    """Bits of a value; None where it is not quantised."""
    return _BITS.get(cache_type)
