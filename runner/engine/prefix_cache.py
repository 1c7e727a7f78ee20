"""PrefixCache: what rows have read and said, as their state remembers it, for the next request that begins alike.

Owns the stored segments; a slot gets copies and gives copies, so neither can damage the other. Thread: the executor's.
"""

from collections.abc import Sequence

from models.executors.base import Executor, Segment
from runner.engine.disk_cache import DiskCache
from runner.engine.radix_tree import RadixTree

STORE_TOKENS = 256
"""A row in progress is stored whenever so many of its tokens are new: before they can slide out of a usual window."""


class PrefixCache:
    """Keeps at most `limit_bytes` of state, shared between prompts that begin alike.

    With a `disk`, what is stored is written there too, and what is not held is looked for there.
    """

    def __init__(self, executor: Executor, limit_bytes: int, disk: DiskCache | None = None) -> None:
        self._executor = executor
        self._limit_bytes = limit_bytes
        self._disk = disk
        self._tree: RadixTree[Segment] = RadixTree(limit_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._tree.nbytes

    def fill(self, slot: int, tokens: Sequence[int], *, chunk: int) -> int:
        """Fill an empty slot with what is stored of `tokens`; how many tokens that was.

        At least one token is left to run, for its logits are wanted. If nothing is new the last chunk is run again as
        it was the first time: a request that is repeated then gets the same logits to the last bit.
        """
        if self._disk is not None:
            self._read_in(self._disk, tokens[:-1])
        stored = self._tree.depth(tokens)
        reusable = stored if stored < len(tokens) - 1 else (len(tokens) - 1) // chunk * chunk
        length, segments = self._tree.match(tokens[:reusable])
        if segments:
            self._executor.restore(slot, segments)
        return length

    def store(self, slot: int, fed: int, tokens: Sequence[int]) -> None:
        """Store a row; what is stored already is not copied again.

        A row of which an inner part is neither stored nor held (it slid out of a window) is left out.

        Args:
            slot: the row's.
            fed: tokens that the slot's state is of.
            tokens: those of them that are known.
        """

        def copy(begin: int, end: int) -> Segment | None:
            held = self._executor.first_held(fed) <= begin
            return self._executor.segment(slot, fed, begin, end) if held else None

        if self._disk is not None:
            self._disk.write(tokens, copy)
        begin = self._tree.depth(tokens)
        if begin < len(tokens) and (segment := copy(begin, len(tokens))) is not None:
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
        for end, segment in disk.read(tokens, begin, self._executor.read_segment):
            surplus = segment.length - (end - begin)
            part = segment.part(surplus, segment.length) if surplus else segment
            self._tree.insert(tokens[:end], begin, part)
            begin = end
            if self._tree.depth(tokens[:end]) < end:
                return
