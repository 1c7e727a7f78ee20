"""PrefixCache: what rows have read and said, as their state remembers it, for the next request that begins alike.

Owns the stored segments; a slot gets copies and gives copies, so neither can damage the other. Where layers are
recurrent a row can be taken up only where a checkpoint was taken: near a prompt's end, where others were seen to part,
every so many tokens, and where a row ended. Thread: the executor's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.executors.base import Checkpoint, Executor, Segment
from runner.engine.disk_cache import DiskCache
from runner.engine.radix_tree import RadixTree

STORE_TOKENS = 256
"""A row in progress is stored whenever so many of its tokens are new: before they can slide out of a usual window."""
CHECKPOINT_TOKENS = 1024
"""The same where a checkpoint is to be kept each time, which may be larger than the keys and values of so many."""
ALIGNMENT = 64
"""Checkpoints within a prompt lie at multiples of this, which the blocks of the cache on disk have too."""
TEMPLATE_TOKENS = 8
"""The last tokens of a prompt are the template's, and may be others in the next turn."""


@dataclass(frozen=True, slots=True)
class Filled:
    """What a slot was filled with."""

    tokens: int
    rests: tuple[int, ...] = ()
    """Where prefill should pause for a checkpoint, in order."""


def rest_point(tokens: int) -> int:
    """Where the prefill of a prompt pauses near its end; 0: nowhere."""
    return max(tokens - TEMPLATE_TOKENS, 0) // ALIGNMENT * ALIGNMENT


class PrefixCache:
    """Keeps at most `limit_bytes` of state, shared between prompts that begin alike.

    With a `disk`, what is stored is written there too, and what is not held is looked for there.
    """

    def __init__(self, executor: Executor, limit_bytes: int, disk: DiskCache | None = None) -> None:
        self._executor = executor
        self._limit_bytes = limit_bytes
        self._disk = disk
        self._tree = self._new_tree()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._tree.nbytes

    def fill(
        self, slot: int, tokens: Sequence[int], *, chunk: int, whole: Callable[[int], int] = lambda place: place
    ) -> Filled:
        """Fill an empty slot with what is stored of `tokens`.

        At least one token is left to run, for its logits are wanted. If nothing is new the last chunk is run again as
        it was the first time: a request that is repeated then gets the same logits to the last bit.

        Args:
            slot: the row's.
            tokens: all that it has.
            chunk: tokens of a piece of prefill.
            whole: gives the last place up to another at which the row may be divided.
        """
        if self._disk is not None:
            self._read_in(self._disk, tokens[:-1])
        stored = self._tree.depth(tokens)
        recurrent = self._executor.needs_checkpoints
        last = rest_point(len(tokens)) if recurrent else (len(tokens) - 1) // chunk * chunk
        if stored < len(tokens) - 1 or (recurrent and self._tree.resumable(tokens[:last]) < last):
            last = min(stored, len(tokens) - 1)
        length, segments, checkpoint = self._tree.match(tokens[: whole(last)])
        while (begin := whole(length)) < length:
            length, segments, checkpoint = self._tree.match(tokens[:begin])
        if segments:
            self._executor.restore(slot, segments, checkpoint)
        if not recurrent:
            return Filled(length)
        rests = {min(stored, len(tokens) - 1) // ALIGNMENT * ALIGNMENT, rest_point(len(tokens))}
        return Filled(length, tuple(sorted({whole(place) for place in rests if whole(place) > length})))

    def store(self, slot: int, fed: int, tokens: Sequence[int]) -> bool:
        """Store a row; what is stored already is not copied again. False: a checkpoint is needed and there is none.

        A row of which an inner part is neither stored nor held (it slid out of a window) is left out.

        Args:
            slot: the row's.
            fed: tokens that the slot's state is of.
            tokens: those of them that are known.
        """

        def copy(begin: int, end: int) -> Segment | None:
            held = self._executor.first_held(fed) <= begin
            return self._executor.segment(slot, fed, begin, end) if held else None

        checkpoint: Checkpoint | None = None
        if self._executor.needs_checkpoints and self._tree.resumable(tokens) < len(tokens):
            checkpoint = self._executor.checkpoint(slot, fed) if fed == len(tokens) else None
            if checkpoint is None:
                return False
        if self._disk is not None:
            self._disk.write(tokens, copy, checkpoint)
        begin = self._tree.depth(tokens)
        if begin < len(tokens) and (segment := copy(begin, len(tokens))) is not None:
            self._tree.insert(tokens, begin, segment, checkpoint)
        elif begin == len(tokens) and checkpoint is not None:
            self._tree.mark(tokens, checkpoint)
        return True

    def shrink(self, limit_bytes: int, tokens: Sequence[int]) -> None:
        """Let go of what was of use longest ago, of what `tokens` can use last, until no more than that is held."""
        self._tree.touch(tokens)
        self._tree.shrink(limit_bytes)

    def clear(self) -> None:
        """Let go of everything; what is on disk stays."""
        self._tree = self._new_tree()

    def close(self) -> None:
        """Let go of everything, and have written what can be in little time."""
        self.clear()
        if self._disk is not None:
            self._disk.close()

    def _new_tree(self) -> RadixTree[Segment, Checkpoint]:
        return RadixTree(self._limit_bytes, needs_checkpoints=self._executor.needs_checkpoints)

    def _read_in(self, disk: DiskCache, tokens: Sequence[int]) -> None:
        """Bring back from the disk what the tree does not hold of `tokens`, as far as the limit allows."""
        if self._executor.needs_checkpoints:
            self._read_in_to_checkpoint(disk, tokens)
            return
        begin = self._tree.depth(tokens)
        for end, segment in disk.read(tokens, begin, self._executor.read_segment):
            surplus = segment.length - (end - begin)
            part = segment.part(surplus, segment.length) if surplus else segment
            self._tree.insert(tokens[:end], begin, part)
            begin = end
            if self._tree.depth(tokens[:end]) < end:
                return

    def _read_in_to_checkpoint(self, disk: DiskCache, tokens: Sequence[int]) -> None:
        """The same where rows can be taken up at checkpoints alone: all up to the last one, or nothing."""
        known = self._tree.resumable(tokens)
        end, checkpoint = disk.read_checkpoint(tokens, known, self._executor.read_checkpoint)
        if checkpoint is None:
            return
        own, begin = tokens[:end], self._tree.depth(tokens[:end])
        pieces = list(disk.read(own, begin, self._executor.read_segment))
        if (pieces[-1][0] if pieces else begin) < end:
            return
        for reached, segment in pieces:
            surplus = segment.length - (reached - begin)
            part = segment.part(surplus, segment.length) if surplus else segment
            self._tree.insert(own[:reached], begin, part, checkpoint if reached == end else None)
            begin = reached
            if self._tree.depth(own[:reached]) < reached:
                return
        if not pieces:
            self._tree.mark(own, checkpoint)
