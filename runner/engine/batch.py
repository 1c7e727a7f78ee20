"""One step, as plain data: which rows run what, and what is drawn for them."""

import time
from collections.abc import Sequence as Items
from concurrent.futures import wait
from dataclasses import dataclass

from models.executors.base import Executor, Logits, Row, Sampled, Step
from models.sampling import Draw, Drawn, Sampling
from runner.engine.constraint import MaskWorker
from runner.engine.scheduler import Chunk
from runner.engine.sequence import Sequence, SequenceStatus

_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True, slots=True)
class Run:
    """A row that yields tokens: at least the one behind its newest, one more for each draft that proves right."""

    row: Sequence
    drafts: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that are drawn."""
        return 1 + len(self.drafts)

    def accepted(self, drawn: Items[Drawn]) -> int:
        """How many drafts are what was drawn in their place. Shapes: as many as `length`."""
        count = 0
        while count < len(self.drafts) and self.drafts[count] == drawn[count].token:
            count += 1
        return count

    def planned(self) -> Row:
        """What the executor is told of a row that decodes."""
        row = self.row
        return row.planned(() if row.unread else (row.tokens[-1], *self.drafts), self.length)

    def draws(self) -> list[Draw]:
        """What is drawn, place behind place."""
        return [self.row.draw(self.drafts[:place]) for place in range(self.length)]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step: those that decode, and behind them at most one prefill chunk."""

    decode: tuple[Run, ...]
    chunk: Chunk | None
    mute: bool = False
    """The chunk completes the prompt of a row that may not speak yet: its logits are kept, and nothing is drawn."""

    @property
    def rows(self) -> list[Sequence]:
        """All rows of the step."""
        rows = [run.row for run in self.decode]
        return rows if self.chunk is None else [*rows, self.chunk.row]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The rows that yield tokens, in the order in which they are drawn."""
        speaks = self.chunk is not None and self.chunk.is_last and not self.mute
        return (*self.decode, Run(self.chunk.row)) if self.chunk is not None and speaks else self.decode

    def begin(self, executor: Executor, masks: MaskWorker) -> "UnderWay":
        """Have the executor begin the step, and the masks made meanwhile. Thread: the executor's."""
        begun_ns = time.perf_counter_ns()
        # Where steps are under way, each has something to wait for: what is drawn behind an unfinished prompt is not
        # looked at.
        marks = executor.depth > 0 or self.mute
        pending = masks.begin([(row.constraint, run.drafts) for run in self.runs if (row := run.row).constraint])
        try:
            logits = self._logits(executor, marks=marks)
        finally:
            wait(pending)
        sampled = None if logits is None else executor.sample(logits, self.draws(marks=marks))
        for run in self.decode:
            run.row.fed += 1
        for run in self.runs:
            run.row.unread += 1
        if (chunk := self.chunk) is not None:
            chunk.row.fed += chunk.length
            if chunk.is_last:
                chunk.row.status = SequenceStatus.HELD if self.mute else SequenceStatus.DECODE
                chunk.row.first_logits = logits.last() if self.mute and logits is not None else None
        return UnderWay(self, sampled, begun_ns)

    def _logits(self, executor: Executor, *, marks: bool) -> Logits | None:
        """Those of the step; of a row that was held they are kept already."""
        if self.chunk is not None and (kept := self.chunk.row.first_logits) is not None:
            return kept
        return executor.forward(self.step(marks=marks))

    def step(self, *, marks: bool = False) -> Step:
        """What the executor runs; if it `marks`, something is drawn for a chunk that yields nothing too."""
        rows = [run.planned() for run in self.decode]
        if (chunk := self.chunk) is not None:
            tokens = chunk.row.tokens[chunk.row.fed : chunk.row.fed + chunk.length]
            rows.append(chunk.row.planned(tokens, int(chunk.is_last or marks)))
        return Step(tuple(rows))

    def draws(self, *, marks: bool = False) -> list[Draw]:
        """What is drawn for the same step, place behind place."""
        draws = [draw for run in self.runs for draw in run.draws()]
        if marks and self.chunk is not None and (self.mute or not self.chunk.is_last):
            draws.append(Draw(_GREEDY, 0.0, self.chunk.row.slot))
        return draws


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A step that was begun and not read yet."""

    batch: Batch
    sampled: Sampled | None
    """None: nothing was drawn, and all was computed at once."""
    begun_ns: int

    @property
    def must_be_read_first(self) -> bool:
        """Whether the next step needs to know what this one says: how many drafts were right, what to draft upon."""
        return any(run.drafts or run.row.drafts_next for run in self.batch.runs)

    def read(self) -> list[list[Drawn]]:
        """Wait for the step: what was drawn for each of the batch's `runs`."""
        drawn = [] if self.sampled is None else self.sampled.read()
        parts, begin = [], 0
        for run in self.batch.runs:
            parts.append(drawn[begin : begin + run.length])
            begin += run.length
        return parts
