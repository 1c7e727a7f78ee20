"""Admission: whether a request's keys and values fit into the memory that is left.

Owns the arithmetic; `decide` is a function of numbers alone. A row is let in if what it will need (state, and for
pictures the tower's rows and largest pass), what the running rows may still grow by and a step's working space are
there. What is kept for later makes room first; then the row waits for others to end; what could not fit even then is
refused with figures, and nothing else is: free memory is a rough figure.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from runner.engine.sequence import PreparedText
from runner.engine.sequence import Sequence as Row
from runner.errors import Busy, InsufficientMemory

UNBOUNDED_SHARE = 4
"""An answer without a bound is expected to take this part of the context that the prompt leaves,"""
UNBOUNDED_TOKENS = 256, 2048
"""but no less than the first and no more than the second."""
NEGLIGIBLE_BYTES = 64 << 20
"""What is dared whatever the figures say: systems that compress or swap often call nearly nothing free."""
MAX_WAITING_BYTES = 2 << 30
"""What the pictures of all requests that wait may take, made ready; one request's are never more than half of it."""
GIB = 2**30


class Verdict(Enum):
    """What becomes of a request that asks to run."""

    ADMIT = "admit"
    WAIT = "wait"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Memory:
    """What there is, in bytes."""

    free: int
    """What the process may still take."""
    working: int = 0
    """What a step takes besides keys and values."""
    stored: int = 0
    """What the prefix cache holds and would give up."""
    held: int = 0
    """What the running rows hold and give back when they end."""
    promised: int = 0
    """What the running rows are expected to take besides."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a request; `give_up` bytes of the prefix cache have to go first."""

    verdict: Verdict
    give_up: int = 0


def decide(needed: int, memory: Memory) -> Decision:
    """Whether a row that will need that many bytes may run now, later or never."""
    missing = max(0, needed + memory.promised + memory.working - memory.free)
    if missing <= memory.stored:
        return Decision(Verdict.ADMIT, missing)
    if needed > max(memory.free + memory.stored + memory.held, NEGLIGIBLE_BYTES):
        return Decision(Verdict.REFUSE)
    if memory.held + memory.promised > 0:
        return Decision(Verdict.WAIT)
    return Decision(Verdict.ADMIT, memory.stored)


def planned_tokens(request: PreparedText) -> int:
    """The tokens that a row is expected to hold: its prompt and its answer's bound, or a share of what is left."""
    rest = request.limit - len(request.tokens)
    if request.num_predict is not None and request.num_predict < rest:
        return len(request.tokens) + request.num_predict
    least, most = UNBOUNDED_TOKENS
    return len(request.tokens) + min(rest, max(least, min(rest // UNBOUNDED_SHARE, most)))


@dataclass(frozen=True, slots=True)
class Usage:
    """Who is in the batch and what is stored, at one moment."""

    rows: tuple[tuple[int, int], ...] = ()
    """Of each running row the tokens that it holds, and those that it is expected to hold."""
    stored: int = 0
    """Bytes of the prefix cache, and of pictures that are kept for later."""
    pictures: int = 0
    """Bytes of the running rows' pictures, made ready."""
    looking: int = 0
    """Bytes that the running rows' pictures are expected to take besides."""
    waiting: int = 0
    """Bytes of the pictures of rows that wait."""


def usage(running: Iterable[Row], waiting: Iterable[Row], stored: int) -> Usage:
    """The present one, beside caches of `stored` bytes. Thread: the executor's."""
    running = list(running)
    return Usage(
        tuple((row.fed, planned_tokens(row.request)) for row in running),
        stored,
        sum(row.sight.held_bytes for row in running if row.sight is not None),
        sum(row.sight.needed_bytes for row in running if row.sight is not None and row.fed < row.sight.end),
        sum(row.sight.held_bytes for row in waiting if row.sight is not None),
    )


class Admission:
    """Looks after the rows' memory. Thread: any; figures of rows that run on meanwhile are a step old at worst."""

    def __init__(
        self,
        state_nbytes: Callable[[int], int],
        free_bytes: Callable[[], int],
        *,
        working_bytes: int,
        give_back: Callable[[], None] = lambda: None,
    ) -> None:
        """Watch.

        Args:
            state_nbytes: What a row of that many tokens takes.
            free_bytes: What the process may still take, now.
            working_bytes: What a step takes besides.
            give_back: Gives the system what the process keeps of freed memory; called before a refusal.
        """
        self._state_nbytes = state_nbytes
        self._free_bytes = free_bytes
        self._working_bytes = working_bytes
        self._give_back = give_back

    def check(self, request: PreparedText, beside: Usage) -> None:
        """Refuse what will not fit even when nothing else runs.

        Raises:
            InsufficientMemory: it will not; the message has the figures.
            Busy: the pictures of those who wait take so much that nobody else's is to be kept beside them.
        """
        if request.sight is not None and request.sight.held_bytes + beside.waiting > MAX_WAITING_BYTES:
            raise Busy("the images of the requests that wait take too much memory, try again later")
        if self.decide(request, beside).verdict is Verdict.REFUSE:
            raise self.refusal(request, beside)

    def decide(self, request: PreparedText, beside: Usage) -> Decision:
        """Whether a request may join the rows that run."""
        needed = self._needed(request)
        decision = decide(needed, self._memory(beside))
        if decision.verdict is not Verdict.REFUSE:
            return decision
        self._give_back()
        return decide(needed, self._memory(beside))

    def refusal(self, request: PreparedText, beside: Usage) -> InsufficientMemory:
        """What a request that was refused is told."""
        memory = self._memory(beside)
        needed, most = self._needed(request), memory.free + memory.stored + memory.held
        kept, images = ("keys and values", "") if request.sight is None else ("keys, values and images", ", send fewer")
        return InsufficientMemory(
            f"insufficient memory: a prompt of {len(request.tokens)} tokens and its answer need {needed / GIB:.2f} GiB "
            f"for their {kept}, and {most / GIB:.2f} GiB are available; shorten the prompt{images}, set a smaller "
            "num_predict or num_ctx, or start the runner with --kv-cache-type=q8_0"
        )

    def _memory(self, beside: Usage) -> Memory:
        held = promised = 0
        for tokens, planned in beside.rows:
            has = self._state_nbytes(tokens) if tokens else 0
            held += has
            promised += max(0, self._state_nbytes(planned) - has)
        held, promised = held + beside.pictures, promised + beside.looking
        return Memory(self._free_bytes(), self._working_bytes, beside.stored, held, promised)

    def _needed(self, request: PreparedText) -> int:
        """What a request will take; what its pictures hold already is not free as it is."""
        looking = 0 if request.sight is None else request.sight.needed_bytes
        return self._state_nbytes(planned_tokens(request)) + looking
