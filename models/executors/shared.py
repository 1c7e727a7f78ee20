"""An executor that is several ranks: the first rank's, which tells the others what it is told itself.

All of them run the same steps in lockstep; who looks from outside sees one executor. An error on any rank leaves them
apart, so after the first one nothing works any more.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from models.errors import ExecutionError
from models.executors import orders
from models.executors.base import Checkpoint, Executor, HostArray, Logits, Sampled, Segment, Step
from models.executors.orders import Order
from models.sampling import Draw


class Others(Protocol):
    """The other ranks, as the first one sees them. Thread: any."""

    def tell(self, order: Order) -> None:
        """Give them an order.

        Raises:
            ExecutionError: one of them is lost.
        """
        ...

    def explain(self, error: Exception) -> ExecutionError:
        """What this rank's failure means: most often that another is lost. They are all given up then."""
        ...


Tell = Callable[[Order], None]


class RankedExecutor(Executor, Protocol):
    """One rank's executor."""

    def hear(self, logits: Logits, slots: Sequence[int]) -> None:
        """What `sample` is on the ranks that do not draw, one slot for each wanted place."""
        ...


@dataclass(slots=True)
class _Numbers:
    """The numbers of what ranks hold for the first one, and those that are to be forgotten."""

    next: "itertools.count[int]" = field(default_factory=itertools.count)
    ended: deque[int] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Ticket:
    """A number, given back when nobody holds it any more. Thread: any."""

    numbers: _Numbers
    number: int = field(init=False)

    def __post_init__(self) -> None:
        self.number = next(self.numbers.next)

    def __del__(self) -> None:
        self.numbers.ended.append(self.number)


@dataclass(frozen=True, slots=True)
class SharedSegment:
    """Every rank's part of a segment (see `Segment`)."""

    own: Segment
    tell: Tell
    ticket: _Ticket

    @property
    def length(self) -> int:
        """See `Segment.length`."""
        return self.own.length

    @property
    def nbytes(self) -> int:
        """See `Segment.nbytes`: of the first rank."""
        return self.own.nbytes

    def part(self, begin: int, end: int) -> "SharedSegment":
        """See `Segment.part`."""
        ticket = _Ticket(self.ticket.numbers)
        self.tell(orders.Part(ticket.number, self.ticket.number, begin, end))
        return SharedSegment(self.own.part(begin, end), self.tell, ticket)

    def arrays(self) -> Iterator[tuple[str, HostArray]]:
        """See `Segment.arrays`. Nobody asks: there is no file that all ranks' parts could be in."""
        raise AssertionError("with ranks there is no cache on disk")


@dataclass(frozen=True, slots=True)
class SharedCheckpoint:
    """Every rank's part of a checkpoint (see `Checkpoint`)."""

    own: Checkpoint
    ticket: _Ticket

    @property
    def nbytes(self) -> int:
        """See `Checkpoint.nbytes`: of the first rank."""
        return self.own.nbytes

    def arrays(self) -> Iterator[tuple[str, HostArray]]:
        """See `Checkpoint.arrays`; as `SharedSegment.arrays`."""
        raise AssertionError("with ranks there is no cache on disk")


@dataclass(frozen=True, slots=True)
class SharedLogits:
    """Logits of a step's wanted places."""

    own: Logits

    def read(self) -> npt.NDArray[np.float32]:
        """See `Logits.read`."""
        return self.own.read()

    def last(self) -> "SharedLogits":
        """See `Logits.last`."""
        return SharedLogits(self.own.last())


class SharedExecutor:
    """Implements `Executor`. Thread: the executor's, but for what `Executor` says otherwise."""

    def __init__(self, own: Executor, others: Others) -> None:
        """`own` is the first rank's."""
        self._own, self._others = own, others
        self._numbers = _Numbers()
        self._lost = False

    @property
    def depth(self) -> int:
        """See `Executor.depth`."""
        return self._own.depth

    @property
    def vocab_size(self) -> int:
        """See `Executor.vocab_size`. Thread: any."""
        return self._own.vocab_size

    @property
    def needs_checkpoints(self) -> bool:
        """See `Executor.needs_checkpoints`. Thread: any."""
        return self._own.needs_checkpoints

    def forward(self, step: Step) -> SharedLogits | None:
        """See `Executor.forward`."""
        self._tell(orders.Forward(step))
        try:
            logits = self._own.forward(step)
        except ExecutionError as error:
            self._lost = True
            raise self._others.explain(error) from error
        return None if logits is None else SharedLogits(logits)

    def sample(self, logits: Logits, draws: Sequence[Draw]) -> Sampled:
        """See `Executor.sample`. What is drawn goes with the next step, if that is not begun before it is read."""
        assert isinstance(logits, SharedLogits)
        if self.depth:
            self._tell(orders.Sample(tuple(draw.slot for draw in draws)))
        return self._own.sample(logits.own, draws)

    def draft_room(self, begin: int) -> int:
        """See `Executor.draft_room`. Thread: any."""
        return self._own.draft_room(begin)

    def state_nbytes(self, tokens: int) -> int:
        """See `Executor.state_nbytes`. Thread: any."""
        return self._own.state_nbytes(tokens)

    def first_held(self, tokens: int) -> int:
        """See `Executor.first_held`. Thread: any."""
        return self._own.first_held(tokens)

    def segment(self, slot: int, tokens: int, begin: int, end: int) -> SharedSegment:
        """See `Executor.segment`."""
        ticket = _Ticket(self._numbers)
        self._tell(orders.Copy(ticket.number, slot, tokens, begin, end))
        return SharedSegment(self._own.segment(slot, tokens, begin, end), self._tell, ticket)

    def checkpoint(self, slot: int, tokens: int) -> SharedCheckpoint | None:
        """See `Executor.checkpoint`."""
        ticket = _Ticket(self._numbers)
        self._tell(orders.Keep(ticket.number, slot, tokens))
        own = self._own.checkpoint(slot, tokens)
        return None if own is None else SharedCheckpoint(own, ticket)

    def restore(self, slot: int, segments: Sequence[Segment], checkpoint: Checkpoint | None = None) -> None:
        """See `Executor.restore`."""
        shared = [segment for segment in segments if isinstance(segment, SharedSegment)]
        assert len(shared) == len(segments)
        assert checkpoint is None or isinstance(checkpoint, SharedCheckpoint)
        kept = None if checkpoint is None else checkpoint.ticket.number
        self._tell(orders.Restore(slot, tuple(segment.ticket.number for segment in shared), kept))
        self._own.restore(slot, [segment.own for segment in shared], checkpoint and checkpoint.own)

    def read_segment(self, arrays: Mapping[str, HostArray], length: int) -> Segment:  # noqa: ARG002
        """See `Executor.read_segment`. Raises ValueError: no file has one."""
        raise ValueError("a segment of several ranks is not kept in a file")

    def read_checkpoint(self, arrays: Mapping[str, HostArray]) -> Checkpoint:  # noqa: ARG002
        """See `Executor.read_checkpoint`. Raises ValueError: no file has one."""
        raise ValueError("a checkpoint of several ranks is not kept in a file")

    def release(self, slot: int) -> None:
        """See `Executor.release`. Of ranks that are lost nothing is to be released."""
        if not self._lost:
            self._tell(orders.Release(slot))
            self._own.release(slot)

    def memory_bytes(self) -> int:
        """See `Executor.memory_bytes`: of the first rank. Thread: any."""
        return self._own.memory_bytes()

    def give_back(self) -> None:
        """See `Executor.give_back`: of the first rank. Thread: any."""
        self._own.give_back()

    def close(self) -> None:
        """See `Executor.close`."""
        if not self._lost:
            self._tell(orders.Close())
        self._own.close()

    def _tell(self, order: Order) -> None:
        """Give an order to the others. Raises ExecutionError: they are lost."""
        if self._lost:
            raise ExecutionError("a rank was lost")
        try:
            if self._numbers.ended:
                count = len(self._numbers.ended)
                self._others.tell(orders.Forget(tuple(self._numbers.ended.popleft() for _ in range(count))))
            self._others.tell(order)
        except ExecutionError:
            self._lost = True
            raise


class Follower:
    """What another rank does with its orders. Thread: the executor's."""

    def __init__(self, own: RankedExecutor) -> None:
        self._own = own
        self._segments: dict[int, Segment] = {}
        self._checkpoints: dict[int, Checkpoint] = {}
        self._logits: Logits | None = None

    def obey(self, order: Order) -> bool:
        """Do what the first rank does; whether there is more to do.

        Raises:
            ExecutionError: the device could not.
        """
        match order:
            case orders.Forward(step):
                self._logits = self._own.forward(step) or self._logits
            case orders.Sample(slots):
                assert self._logits is not None
                self._own.hear(self._logits, slots)
            case orders.Release(slot):
                self._own.release(slot)
            case orders.GiveBack():
                self._own.give_back()
            case orders.Close():
                self._segments.clear()
                self._checkpoints.clear()
                self._own.close()
                return False
            case _:
                self._keep(order)
        return True

    def _keep(self, order: Order) -> None:
        """Hold, part, put back and let go of what rows leave to later ones."""
        match order:
            case orders.Copy(number, slot, tokens, begin, end):
                self._segments[number] = self._own.segment(slot, tokens, begin, end)
            case orders.Part(number, whole, begin, end):
                self._segments[number] = self._segments[whole].part(begin, end)
            case orders.Keep(number, slot, tokens):
                if (kept := self._own.checkpoint(slot, tokens)) is not None:
                    self._checkpoints[number] = kept
            case orders.Restore(slot, segments, checkpoint):
                kept = None if checkpoint is None else self._checkpoints[checkpoint]
                self._own.restore(slot, [self._segments[number] for number in segments], kept)
            case orders.Forget(numbers):
                for number in numbers:
                    self._segments.pop(number, None)
                    self._checkpoints.pop(number, None)
