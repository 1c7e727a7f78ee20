"""RowStore: what rows leave to those that begin alike, and what they take of it, whether any is kept or not.

Owns when a row is stored and what its slot is filled with. Thread: the executor's.
"""

from models.executors.base import Executor
from runner.engine.prefix_cache import CHECKPOINT_TOKENS, STORE_TOKENS, PrefixCache
from runner.engine.sequence import Sequence


class RowStore:
    """Between the rows of a batch and the prefix cache."""

    def __init__(self, executor: Executor, prefixes: PrefixCache | None) -> None:
        self._executor = executor
        self._prefixes = prefixes
        self._store_tokens = CHECKPOINT_TOKENS if executor.needs_checkpoints else STORE_TOKENS
        """A row in progress is stored whenever so many of its tokens are new."""

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return 0 if self._prefixes is None else self._prefixes.nbytes

    def fill(self, row: Sequence, chunk: int) -> None:
        """Put into a row's slot what is stored of its tokens; `chunk` is the length of a piece of prefill."""
        self._executor.release(row.slot)
        row.fed = row.stored = 0
        row.rests = ()
        if self._prefixes is None:
            return
        if (sight := row.sight) is None:
            filled = self._prefixes.fill(row.slot, row.tokens, chunk=chunk)
            row.rests = filled.rests
        else:
            filled = self._prefixes.fill(row.slot, row.tokens, chunk=chunk, whole=sight.whole)
            # A step that is longer than others may move more out of a window than was stored.
            pauses = (place for place in sight.long_runs(chunk) if place > filled.tokens)
            row.rests = tuple(sorted({*filled.rests, *pauses}))
        row.fed = row.stored = filled.tokens

    def store(self, row: Sequence) -> None:
        """Keep what a row's slot holds."""
        prefixes, held = self._prefixes, row.tokens[: row.held]
        if prefixes is not None and row.held > row.stored and prefixes.store(row.slot, row.fed, held):
            row.stored = row.held

    def visit(self, row: Sequence) -> None:
        """Keep what a row in progress has grown by, if it is time."""
        if row.rests_now or row.held - row.stored >= self._store_tokens:
            self.store(row)
            row.rests = tuple(place for place in row.rests if place > row.fed)

    def give_back(self, nbytes: int, row: Sequence) -> None:
        """Let go of so many bytes, of what a row that waits can use last."""
        if self._prefixes is not None and nbytes > 0:
            self._prefixes.shrink(self._prefixes.nbytes - nbytes, row.tokens)
            self._executor.give_back()

    def clear(self) -> None:
        """Let go of everything; what is on disk stays."""
        if self._prefixes is not None:
            self._prefixes.clear()

    def close(self) -> None:
        """Let go of everything for good."""
        if self._prefixes is not None:
            self._prefixes.close()
        self._prefixes = None
