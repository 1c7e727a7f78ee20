"""Scheduler: which rows run in the next step, and how much of a prompt.

Owns the queue, the rows in the batch, their slots and the size of a prefill chunk; refuses to know what a model is. A
step is one token of each decoding row and at most one chunk of one prompt, first come first served; so neither a flood
of prompts nor a long one keeps a decoding row waiting for more than about `STEP_BOUND_S`.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runner.engine.sequence import NO_SLOT, Sequence, SequenceStatus

STEP_BOUND_S = 0.5
MIN_CHUNK = 32
"""Below this a step hardly gets shorter: reading the weights is then most of it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `length` tokens of a row's prompt."""

    row: Sequence
    length: int
    is_last: bool
    """With this chunk the row's prompt is complete, so it yields a token."""

    @property
    def end(self) -> int:
        """The first token behind it."""
        return self.row.fed + self.length


class Scheduler:
    """Lets rows in, picks the next chunk, and keeps a step short. Thread: the executor's."""

    def __init__(self, *, parallel: int, prefill_chunk: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(parallel))
        self._largest = max(prefill_chunk, 1)
        self.chunk = self._largest

    @property
    def idle(self) -> bool:
        """Nothing is queued or running."""
        return not self.running and not self.waiting

    @property
    def has_prompts(self) -> bool:
        """A row in the batch has some of its prompt yet to run."""
        return any(row.status is SequenceStatus.PREFILL for row in self.running)

    def add(self, row: Sequence) -> None:
        """Queue a row."""
        self.waiting.append(row)

    def remove(self, row: Sequence) -> None:
        """Take a row out, wherever it is."""
        if row.status is SequenceStatus.WAITING:
            self.waiting.remove(row)
        else:
            self.running.remove(row)

    def admit(self, may_run: Callable[[Sequence], bool] = lambda _: True) -> Sequence | None:
        """Let the first waiting row into the batch; None if there is none, no room, or it may not run."""
        if not (self.waiting and self._free and may_run(self.waiting[0])):
            return None
        row = self.waiting.popleft()
        row.status = SequenceStatus.PREFILL
        # The lowest one: an executor may run the slots between the first and the last that are taken.
        row.slot = heapq.heappop(self._free)
        self.running.append(row)
        return row

    def free(self, row: Sequence) -> None:
        """Let another have the slot of a row that was taken out."""
        heapq.heappush(self._free, row.slot)
        row.slot = NO_SLOT

    def next_chunk(self, may_run: Callable[[Sequence, int], bool] = lambda *_: True) -> Chunk | None:
        """The next piece of the oldest prompt that is not complete, of those pieces that may run.

        Pieces end at multiples of the chunk's size, so that a prompt is divided alike wherever it was taken up, and
        rounds alike. Only what looks ahead over such a place is not divided: it is a piece by itself, however long.
        `may_run` is asked of a row and the first token behind its piece.
        """
        for row in self.running:
            if row.status is SequenceStatus.PREFILL:
                length = min(self.chunk - row.fed % self.chunk, row.unfed, row.until_rest)
                if row.sight is not None:
                    length = row.sight.chunk_end(row.fed, row.fed + length) - row.fed
                if may_run(row, row.fed + length):
                    return Chunk(row, length, is_last=length == row.unfed)
        return None

    def observe(self, length: int, seconds: float) -> None:
        """Learn from a step that held a chunk of that length: shrink after a long one, grow back after a short one."""
        if seconds > STEP_BOUND_S:
            # By halves, so that few sizes occur: the size decides how sums are rounded.
            while seconds > STEP_BOUND_S and self.chunk // 2 >= MIN_CHUNK:
                self.chunk //= 2
                seconds /= 2
        elif seconds < STEP_BOUND_S / 4 and length == self.chunk:
            self.chunk = min(self.chunk * 2, self._largest)
