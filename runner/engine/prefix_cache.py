"""PrefixCache: keys and values of what rows have read and said, for the next request that begins alike.

Owns the stored segments; rows get copies and give copies, so neither can damage the other. A row's own cache is the
`models.cache` objects that the engine holds; this one only fills and reads them. Thread: the MLX thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from models.cache import LayerCache, Segment
from runner.engine.radix_tree import RadixTree

STORE_TOKENS = 256
"""A row in progress is stored whenever so many of its tokens are new: before they can slide out of a usual window."""


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Consecutive tokens of a row over all layers."""

    layers: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(segment.nbytes for segment in self.layers)

    def part(self, begin: int, end: int) -> "RowSegment":
        """A copy of the tokens [begin, end) of this segment."""
        part = RowSegment(tuple(segment.part(begin, end) for segment in self.layers))
        part.evaluate()
        return part

    def evaluate(self) -> None:
        """Compute the copies, so that they no longer hold what they were copied from."""
        mx.async_eval([array for segment in self.layers for array in segment.arrays])


class PrefixCache:
    """Keeps at most `limit_bytes` of keys and values, shared between prompts that begin alike."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._tree: RadixTree[RowSegment] = RadixTree(limit_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._tree.nbytes

    def fill(self, cache: Sequence[LayerCache], tokens: Sequence[int], *, chunk: int) -> int:
        """Fill a row's empty cache with what is stored of `tokens`; how many tokens that was.

        At least one token is left to run, for its logits are wanted. If nothing is new the last chunk is run again as
        it was the first time: a request that is repeated then gets the same logits to the last bit.
        """
        stored = self._tree.depth(tokens)
        reusable = stored if stored < len(tokens) - 1 else (len(tokens) - 1) // chunk * chunk
        length, segments = self._tree.match(tokens[:reusable])
        if segments:
            for index, layer in enumerate(cache):
                layer.restore([segment.layers[index] for segment in segments])
        return length

    def store(self, cache: Sequence[LayerCache], tokens: Sequence[int]) -> None:
        """Store a row whose cache holds exactly `tokens`; what is stored already is not copied again.

        A row of which an inner part is neither stored nor held (it slid out of a window) is left out.
        """
        begin = self._tree.depth(tokens)
        if begin >= len(tokens) or any(layer.first > begin for layer in cache):
            return
        segment = RowSegment(tuple(layer.segment(begin, len(tokens)) for layer in cache))
        segment.evaluate()
        self._tree.insert(tokens, begin, segment)

    def clear(self) -> None:
        """Let go of everything."""
        self._tree = RadixTree(self._limit_bytes)
