"""One step's forward pass: from rows to the logits of those that yield a token."""

import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import mlx.core as mx

from models.llm.base import LanguageModel, Row
from runner.engine.sampler import RowSampler, Sampled, sample_rows
from runner.engine.scheduler import Chunk
from runner.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class Run:
    """A row that yields tokens: at least the one behind its newest, one more for each draft that proves right."""

    row: Sequence
    drafts: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that are sampled."""
        return 1 + len(self.drafts)

    def accepted(self, sampled: Rows[int]) -> int:
        """How many drafts are what was sampled in their place. Shapes: as many tokens as `length`."""
        count = 0
        while count < len(self.drafts) and self.drafts[count] == sampled[count]:
            count += 1
        return count


def settle(row: Sequence, accepted: int) -> None:
    """Keep that many of the drafted tokens that the row's cache holds, and forget the others."""
    if row.unverified > accepted:
        for layer in row.cache:
            layer.trim(row.unverified - accepted)
    row.fed += accepted
    row.unverified = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step: those that decode, and behind them at most one prefill chunk."""

    decode: Rows[Run]
    tokens: mx.array | None
    """The decoding rows' newest tokens, perhaps not computed yet, each with its drafts behind it. Shape (T,)."""
    chunk: Chunk | None

    @property
    def held(self) -> list[Sequence]:
        """All rows of the step."""
        rows = [run.row for run in self.decode]
        return rows if self.chunk is None else [*rows, self.chunk.row]

    def build(self, model: LanguageModel) -> "Step":
        """Build the step. Little is computed yet, but for a long chunk on a CPU. Thread: the MLX thread."""
        begun_ns = time.perf_counter_ns()
        yields = list(self.decode)
        rows = [Row(run.length, run.row.cache) for run in self.decode]
        tokens = self.tokens
        chunk = self.chunk
        ends_prompt = False
        if chunk is not None:
            row, ends_prompt = chunk.row, chunk.is_last
            prompt = mx.array(row.tokens[row.fed : row.fed + chunk.length], dtype=mx.int32)
            tokens = prompt if tokens is None else mx.concatenate([tokens, prompt])
            rows.append(Row(chunk.length, row.cache))
            if ends_prompt:
                yields.append(Run(row))
        assert tokens is not None
        hidden = model(tokens, rows)
        for run in self.decode:
            run.row.fed += 1
            run.row.unverified = len(run.drafts)
        pending: list[mx.array] = []
        marker: list[mx.array] = []
        if chunk is not None:
            chunk.row.fed += chunk.length
            pending = [array for layer in chunk.row.cache for array in layer.arrays()]
            marker = _marker(pending)
            pending += marker
            if ends_prompt:
                chunk.row.status = SequenceStatus.DECODE
            hidden = _yielding(hidden, sum(run.length for run in self.decode), ends_prompt=ends_prompt)
        samplers = [_sampler(run.row) for run in yields for _ in range(run.length)]
        sampled = sample_rows(model.logits(hidden), samplers) if yields else None
        if sampled is not None:
            pending = [*sampled.arrays(), *pending]
        return Step(yields, sampled, marker, chunk, pending, begun_ns)


@dataclass(slots=True)
class Step:
    """A step that was built, perhaps set off, and not read yet."""

    runs: list[Run]
    """The rows that yield tokens, in the order of `sampled`."""
    sampled: Sampled | None
    marker: list[mx.array]
    """What to wait for if nothing was sampled."""
    chunk: Chunk | None
    pending: list[mx.array]
    begun_ns: int
    is_set_off: bool = False
    was_read: bool = False

    @property
    def held(self) -> list[Sequence]:
        """All rows of the step."""
        rows = [run.row for run in self.runs]
        return rows if self.chunk is None else [*rows, self.chunk.row]

    @property
    def must_be_read_first(self) -> bool:
        """Whether the next step needs to know what this one says: how many drafts were right, what to draft upon."""
        return any(run.drafts or run.row.drafts_next for run in self.runs)

    def set_off(self) -> None:
        """Have the step computed, unless that was done before. On a CPU this takes most of the step's time."""
        if not self.is_set_off:
            self.is_set_off = True
            mx.async_eval(self.pending)
            # A cache's array is kept by its cache only: the next step can then write to it in place.
            self.pending = []


def _yielding(hidden: mx.array, decoding: int, *, ends_prompt: bool) -> mx.array:
    """The hidden states that logits are wanted of. Shapes: hidden (T, D), `decoding` of them first; returns (N, D)."""
    if not ends_prompt:
        return hidden[:decoding]
    if not decoding:
        return hidden[-1:]
    return mx.concatenate([hidden[:decoding], hidden[-1:]])


def _marker(arrays: list[mx.array]) -> list[mx.array]:
    """A number that is known when the given arrays are.

    A cache's array itself would not do: the next step overwrites the object, and waiting for it means waiting for that.
    """
    return [arrays[-1][(0,) * arrays[-1].ndim] + 0] if arrays else []


def _sampler(row: Sequence) -> RowSampler:
    assert row.sampler is not None
    return row.sampler
