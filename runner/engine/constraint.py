"""What one row's answer is held to: the masks of its next places.

A grammar is compiled while the row's prompt is read: a `PendingConstraint` stands for what comes of it. A `Constraint`
follows the row's tokens, through its thinking and then through its grammar. Masks are made in a thread of their own
while the model runs; the engine waits for them when it draws. What goes wrong with a row's grammar is kept as that
row's `error`, for the engine to end this row and no other.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import TypeVar

from models.errors import GrammarError
from models.grammar import Compiled, GrammarCompiler, OutputFormat, Pieces
from runner.engine.thinking import Thinking, ThinkingPlans
from runner.errors import BadRequest

logger = logging.getLogger("runner.engine")

T = TypeVar("T")


class Constraint:
    """One row's place in its grammar. Thread: one at a time."""

    def __init__(self, grammar: Compiled, thinking: Thinking | None, pieces: Pieces) -> None:
        self.error: str | None = None
        self._matcher = grammar.matcher()
        self._grammar, self._pieces = grammar, pieces
        self._thinking = thinking
        """None: the grammar is in force."""
        self._state = 0
        self._masks: list[bytes | None] = []

    @property
    def finished(self) -> bool:
        """The answer is complete: nothing but its end may follow."""
        return self._thinking is None and self.error is None and self._matcher.finished

    def admitted(self, tokens: Sequence[int]) -> int:
        """How many drafted tokens may follow, up to one that ends the answer or its thinking."""
        if (thinking := self._thinking) is None:
            return self._matcher.admitted([*takewhile(lambda token: token not in self._pieces.stop_ids, tokens)])
        state = self._state
        for count, token in enumerate(tokens):
            state, rest = thinking.after(state, self._pieces.piece(token))
            if rest is not None:
                return count
        return len(tokens)

    def make_masks(self, drafted: Sequence[int]) -> None:
        """Make the masks of the next place and of those behind drafted tokens that are admitted."""
        self._masks = [None] * (1 + len(drafted))
        if (thinking := self._thinking) is not None:
            state = self._state
            self._masks[0] = thinking.masks[state]
            for place, token in enumerate(drafted, 1):
                state, _ = thinking.after(state, self._pieces.piece(token))
                self._masks[place] = thinking.masks[state]
            return
        try:
            self._masks[:] = self._matcher.masks(drafted)
        except GrammarError as error:
            self._fail(error)

    def mask(self, place: int) -> bytes | None:
        """The mask of the next place, or of one behind so many drafted tokens. None: every token is allowed."""
        return self._masks[place]

    def accept(self, token: int) -> None:
        """Take the row's next token."""
        try:
            if self._thinking is None:
                self._matcher.accept(token)
                return
            self._state, rest = self._thinking.after(self._state, self._pieces.piece(token))
            if rest is not None:
                self._thinking = None
                for each in self._grammar.tokens(rest) or ():
                    self._matcher.accept(each)
        except GrammarError as error:
            self._fail(error)

    def _fail(self, error: GrammarError) -> None:
        self.error = self.error or f"the answer's grammar failed: {error}"


class PendingConstraint:
    """A row's constraint, which may be still to be made."""

    def __init__(self, make: Callable[[], Constraint]) -> None:
        self.made: Constraint | None = None
        """None: not yet. Thread: any."""
        self._make = make

    def complete(self) -> None:
        """Make it, once. Takes long, and cannot be interrupted. Thread: any.

        Raises:
            BadRequest: the format cannot be enforced; the message says why.
        """
        self.made = self._make()


class Constraints:
    """Makes the constraints of requests. Thread: any, several at once."""

    def __init__(self, compiler: GrammarCompiler, pieces: Pieces, width: int) -> None:
        """For the tokens of `width` logits."""
        self._compiler, self._pieces = compiler, pieces
        self._plans = ThinkingPlans(pieces, width)

    def prepare(self, wanted: OutputFormat) -> PendingConstraint:
        """What holds an answer to its format: complete if its grammar was compiled before.

        Raises:
            BadRequest: it is none. Whether it can be enforced is found out when the constraint is completed.
        """
        grammar, spaced = wanted.grammar, bool(wanted.closings)
        if (kept := self._compiler.kept(grammar, spaced=spaced)) is not None:
            pending = PendingConstraint(lambda: self._made(wanted, kept))
            pending.complete()
            return pending
        rest = _understood(lambda: self._compiler.read(grammar, spaced=spaced))
        return PendingConstraint(lambda: self._made(wanted, _understood(rest)))

    def _made(self, wanted: OutputFormat, grammar: Compiled) -> Constraint:
        if grammar.ignored:
            logger.warning("a format is enforced in part", extra={"fields": {"ignored": "; ".join(grammar.ignored)}})
        return Constraint(grammar, self._plans.plan(wanted.closings, grammar), self._pieces)


def _understood(part: Callable[[], T]) -> T:
    """What a part of compiling gives. Raises BadRequest where the format cannot be enforced."""
    try:
        return part()
    except GrammarError as error:
        raise BadRequest(f"invalid structured output grammar: {error}") from error


class MaskWorker:
    """The thread that makes masks. Thread: the executor's."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, wanted: Sequence[tuple[Constraint, Sequence[int]]]) -> list[Future[None]]:
        """Begin to make the masks of rows, each with what is drafted for it; to be waited for before they are used."""
        if not wanted:
            return []
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "masks")
        return [self._pool.submit(_make, wanted)]

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()


def _make(wanted: Sequence[tuple[Constraint, Sequence[int]]]) -> None:
    for constraint, drafted in wanted:
        constraint.make_masks(drafted)
