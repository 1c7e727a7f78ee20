"""What one rank runs: instructions, made once by a plan, in terms of `Ops` and of what ranks say to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from models.arch.base import Tensor
from models.ops import Embedding, LayerState, Norm, Ops
from models.sharding.cuts import Share
from models.sharding.layout import Layout


class Communication(Protocol[Tensor]):
    """What ranks say to each other, and what needs to know of the ranks. Thread: the executor's.

    Every rank says the same things in the same order. The first argument of each is the step's `Ops`.
    """

    def sum(self, ops: Ops[Tensor], x: Tensor) -> Tensor:
        """The sum of all ranks' values. Shapes: (T, D) both ways."""
        ...

    def gather(self, ops: Ops[Tensor], x: Tensor, layout: Layout) -> Tensor:
        """All of what each rank has a part of. Shapes: x (T, local width); returns (T, width)."""
        ...

    def own(self, ops: Ops[Tensor], x: Tensor, layout: Layout) -> Tensor:
        """This rank's part. Shapes: x (T, width); returns (T, local width)."""
        ...

    def own_picks(
        self, ops: Ops[Tensor], picks: Tensor, weights: Tensor, first: int, count: int
    ) -> tuple[Tensor, Tensor]:
        """Picks among the `count` experts from `first` on, the others as the first with a weight of 0.

        Shapes: (T, k) both ways.
        """
        ...

    def embed_part(self, ops: Ops[Tensor], table: Embedding, first: int, rows: int) -> Tensor:
        """The embeddings of tokens in `table`, which has the rows from `first` on of `rows` in all; 0 for others.

        Shapes: returns (T, width).
        """
        ...

    def deepen(self, ops: Ops[Tensor], x: Tensor, layers: int) -> Tensor:
        """See `Ops.deepen`; the first rank alone has pictures. Shapes: x (T, D); returns the same."""
        ...

    def norm_part(self, ops: Ops[Tensor], x: Tensor, norm: Norm, width: int) -> Tensor:
        """The RMSNorm over all ranks' parts, which are `width` together; `norm` has this rank's weights.

        Shapes: x (T, local width); returns the same.
        """
        ...

    def send(self, ops: Ops[Tensor], *values: Tensor, to: int) -> Tensor:
        """Give values to another rank; what is returned is there when they are. Shapes: (T, widths)."""
        ...

    def receive(self, ops: Ops[Tensor], *like: Tensor, widths: tuple[int, ...], source: int) -> tuple[Tensor, ...]:
        """Take values from another rank, of as many tokens as `like` has; without one, as are run.

        Shapes: like (T, …); returns (T, width) each.
        """
        ...


COMMUNICATION = frozenset({"sum", "gather", "own", "own_picks", "embed_part", "deepen", "norm_part", "send", "receive"})


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation on values by number. Those in `ended` are of no use afterwards."""

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[object, ...] = ()
    named: Mapping[str, object] = field(default_factory=dict)
    ended: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions with the values they begin with and what they make, by number."""

    instructions: tuple[Instruction, ...]
    given: tuple[int, ...]
    made: int

    def run(self, ops: Ops[Tensor], communication: Communication[Tensor], *given: Tensor) -> Tensor:
        """Run a rank's part. Shapes: those of the recorded pass, cut as planned. Thread: the executor's."""
        values: dict[int, Any] = dict(zip(self.given, given, strict=True))
        for step in self.instructions:
            inputs = [values[number] for number in step.inputs]
            if step.op in COMMUNICATION:
                outputs = getattr(communication, step.op)(ops, *inputs, *step.args, **step.named)
            elif step.op == "join":
                outputs = ops.join(inputs, *step.args)  # type: ignore[arg-type]
            else:
                outputs = getattr(ops, step.op)(*inputs, *step.args, **step.named)
            if len(step.outputs) == 1 and not isinstance(outputs, tuple):
                values[step.outputs[0]] = outputs
            else:
                values.update(zip(step.outputs, outputs, strict=True))
            # What nothing holds any more gives its memory back within the step.
            del inputs, outputs
            for number in step.ended:
                del values[number]
        made: Tensor = values[self.made]
        return made


def program(instructions: Sequence[Instruction], given: Sequence[int], made: int) -> Program:
    """Instructions that let go of each value behind its last use."""
    ends: dict[int, int] = {}
    for place, step in enumerate(instructions):
        for number in (*step.inputs, *step.outputs):
            ends[number] = place
    ended: dict[int, list[int]] = {}
    for number, place in ends.items():
        if number != made:
            ended.setdefault(place, []).append(number)
    steps = tuple(
        Instruction(step.op, step.inputs, step.outputs, step.args, step.named, tuple(ended.get(place, ())))
        for place, step in enumerate(instructions)
    )
    return Program(steps, tuple(given), made)


@dataclass(frozen=True, slots=True)
class Message:
    """What one instruction says to other ranks: `width` values a token, summed, gathered or sent on."""

    kind: str
    width: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank runs, remembers and holds."""

    forward: Program
    logits: Program
    """From what `forward` made, of the wanted places alone."""
    state: tuple[LayerState, ...]
    """By the numbers that the rank's own instructions say."""
    shares: Mapping[str, Share | None]
    """By `key_of`; None: nothing of it. Of weights that are not here the rank holds all."""
    messages: tuple[Message, ...]
    """What one step says."""
