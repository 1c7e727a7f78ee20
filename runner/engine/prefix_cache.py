"""PrefixCache: keys and values of what rows have read and said, for the next request that begins alike.

Owns the stored segments; rows get copies and give copies, so neither can damage the other. A row's own cache is the
`models.cache` objects that the engine holds; this one only fills and reads them. Thread: the MLX thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from models.cache import LayerCache, Segment
from runner.engine.disk_cache import DiskCache
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
    """Keeps at most `limit_bytes` of keys and values, shared between prompts that begin alike.

    With a `disk`, what is stored is written there too, and what is not held is looked for there.
    """

    def __init__(self, limit_bytes: int, disk: DiskCache | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._disk = disk
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
        if self._disk is not None:
            self._read_in(self._disk, tokens[:-1])
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
        if self._disk is not None:
            self._disk.write(tokens, lambda begin, end: _copy(cache, begin, end))
        begin = self._tree.depth(tokens)
        layers = _copy(cache, begin, len(tokens))
        if begin < len(tokens) and layers is not None:
            segment = RowSegment(layers)
            segment.evaluate()
            self._tree.insert(tokens, begin, segment)

    def shrink(self, limit_bytes: int, tokens: Sequence[int]) -> None:
        """Let go of what was of use longest ago, of what `tokens` can use last, until no more than that is held."""
        self._tree.touch(tokens)
        self._tree.shrink(limit_bytes)

    def clear(self) -> None:
        """Let go of everything; what is on disk stays."""
        self._tree = RadixTree(self._limit_bytes)

    def close(self) -> None:
        """Let go of everything, and have written what can be in little time."""
        self.clear()
        if self._disk is not None:
            self._disk.close()

    def _read_in(self, disk: DiskCache, tokens: Sequence[int]) -> None:
        """Bring back from the disk what the tree does not hold of `tokens`, as far as the limit allows."""
        begin = self._tree.depth(tokens)
        for end, layers in disk.read(tokens, begin):
            block = RowSegment(layers)
            surplus = layers[0].length - (end - begin)
            self._tree.insert(tokens[:end], begin, block.part(surplus, layers[0].length) if surplus else block)
            begin = end
            if self._tree.depth(tokens[:end]) < end:
                return


def _copy(cache: Sequence[LayerCache], begin: int, end: int) -> tuple[Segment, ...] | None:
    """The tokens [begin, end) of a row, a segment a layer, not computed yet; None where they slid out of a window."""
    if any(layer.first > begin for layer in cache):
        return None
    return tuple(layer.segment(begin, end) for layer in cache)
