"""Pipeline parallel: each rank runs some of the layers, and hands on what the next one's need.

A pass is cut where an architecture says that a layer ends. What is alive there, mostly the residual stream alone, is
sent on; the last rank gives the hidden states to the first, which has the embedding and makes the words.
Source: GPipe (arXiv 1811.06965), with one batch under way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from models.arch.base import Model
from models.ops import LayerState, weights_in
from models.sharding.builder import Indivisible
from models.sharding.cuts import Place, Share, key_of
from models.sharding.program import Instruction, Message, Program, RankPlan, program
from models.sharding.record import Call, Recorder, Value

BytesOf = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class _Pass:
    """A recorded pass: its calls, those at which a layer ends, and what each side of these costs."""

    calls: tuple[Call, ...]
    hidden: Value
    ends: tuple[int, ...]
    """Places between calls where it may be cut, in order."""


def plan(model: Model, place: Place, bytes_of: BytesOf) -> RankPlan:
    """One rank's part of a model. Thread: any.

    Args:
        model: with all of its weights declared.
        place: which rank of how many.
        bytes_of: what the tensor of that name takes.

    Raises:
        Indivisible: there are fewer layers than ranks between which something may be handed on.
    """
    assert model.logits is not None
    ahead = Recorder()
    hidden = model.forward(ahead)
    behind = Recorder(count=ahead.count)
    given = behind.value(hidden.width)
    scores = model.logits(behind, given)
    recorded = _Pass(tuple(ahead.calls), hidden, _ends(ahead.calls))
    bounds = _bounds(recorded, behind.calls, place.ranks, bytes_of)
    own = recorded.calls[bounds[place.rank] : bounds[place.rank + 1]]
    first, last = place.rank == 0, place.rank == place.ranks - 1
    used = {key_of(weight) for call in own for weight in call.weights}
    used |= {key_of(weight) for call in behind.calls for weight in call.weights} if first else set()
    shares: dict[str, Share | None] = {
        key_of(weight): None for weight in weights_in(model.weights) if key_of(weight) not in used
    }
    states, numbered = _renumbered(own, model.state)
    forward = _stage(recorded, numbered, bounds, place)
    if first:
        logits = _words(behind.calls, given, scores, place)
    elif last:
        logits = program([Instruction("send", (0,), (1,), named={"to": 0})], (0,), 1)
    else:
        logits = program([], (0,), 0)
    messages = [Message("send", sum(value.width for value in _alive(recorded, bound))) for bound in bounds[1:-1]]
    return RankPlan(forward, logits, states, shares, (*messages, Message("send", hidden.width)))


def _ends(calls: Sequence[Call]) -> tuple[int, ...]:
    """Behind each layer, but where a later one looks at an earlier one's state, or pictures are yet to be added."""
    looked = {call.args[0]: place for place, call in enumerate(calls) if call.op == "look_again"}
    kept = [
        (place, looked[call.args[0]])
        for place, call in enumerate(calls)
        if call.op == "attention" and call.args[0] in looked
    ]
    deepened = max((place for place, call in enumerate(calls) if call.op == "deepen"), default=-1)
    ends = [place + 1 for place, call in enumerate(calls) if call.op == "residual" and call.args != (0,)]
    return tuple(end for end in ends[:-1] if end > deepened and not any(begin < end <= last for begin, last in kept))


def _bounds(recorded: _Pass, behind: Sequence[Call], ranks: int, bytes_of: BytesOf) -> list[int]:
    """Where each rank's calls begin, and where the last one's end: so that the largest rank is as small as may be."""
    if len(recorded.ends) < ranks - 1:
        raise Indivisible(f"layers that end at {len(recorded.ends) + 1} places do not divide")

    def cost(begin: int, end: int) -> int:
        calls = [*recorded.calls[begin:end], *(behind if begin == 0 else ())]
        names = {name for call in calls for weight in call.weights for name, _ in weight.tensors()}
        return sum(bytes_of(name) for name in names)

    total = len(recorded.calls)
    ends = [*recorded.ends, total]
    between = {(a, b): cost(a, b) for a, b in zip([0, *recorded.ends], ends, strict=True)}
    costs = [between[a, b] for a, b in zip([0, *recorded.ends], ends, strict=True)]
    cuts = _divided(costs, ranks)
    return [0, *(recorded.ends[cut - 1] for cut in cuts), total]


def _divided(costs: Sequence[int], parts: int) -> list[int]:
    """Where to cut a row of costs so that the costliest of so many parts costs least."""
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    count = len(costs)
    best: list[list[tuple[int, int]]] = [[(sums[end], 0) for end in range(count + 1)]]
    for part in range(1, parts):
        row = [(0, 0)] * (count + 1)
        for end in range(part + 1, count + 1):
            row[end] = min((max(best[-1][begin][0], sums[end] - sums[begin]), begin) for begin in range(part, end))
        best.append(row)
    cuts: list[int] = []
    end = count
    for part in range(parts - 1, 0, -1):
        end = best[part][end][1]
        cuts.append(end)
    return cuts[::-1]


def _alive(recorded: _Pass, bound: int) -> list[Value]:
    """What was made before a place and is of use behind it, in order."""
    made = {value.number: value for call in recorded.calls[:bound] for value in call.outputs}
    used = {value.number for call in recorded.calls[bound:] for value in call.inputs} | {recorded.hidden.number}
    return [made[number] for number in sorted(used & set(made))]


def _renumbered(calls: Sequence[Call], state: Sequence[LayerState]) -> tuple[tuple[LayerState, ...], list[Call]]:
    """The states that calls have, and the calls with these states' own numbers."""
    numbers: dict[int, int] = {}
    renumbered: list[Call] = []
    for call in calls:
        at = _LAYER_AT.get(call.op)
        layer = call.named.get("layer") if at is None else call.args[at]
        if layer is None:
            renumbered.append(call)
            continue
        assert isinstance(layer, int)
        number = numbers.setdefault(layer, len(numbers))
        if at is None:
            renumbered.append(replace(call, named={**call.named, "layer": number}))
        else:
            renumbered.append(replace(call, args=(*call.args[:at], number, *call.args[at + 1 :])))
    return tuple(state[layer] for layer in numbers), renumbered


_LAYER_AT = {"attention": 0, "look_again": 0, "latent_attention": 1, "short_conv": 1}
"""Where an operation's arguments say which state is the layer's."""


def _stage(recorded: _Pass, own: Sequence[Call], bounds: Sequence[int], place: Place) -> Program:
    steps = [_as_it_is(call) for call in own]
    made = recorded.hidden.number
    if place.rank > 0:
        came = _alive(recorded, bounds[place.rank])
        widths = tuple(value.width for value in came)
        numbers = tuple(value.number for value in came)
        steps.insert(0, Instruction("receive", (), numbers, named={"widths": widths, "source": place.rank - 1}))
    if place.rank < place.ranks - 1:
        going = _alive(recorded, bounds[place.rank + 1])
        made = max((number for step in steps for number in step.outputs), default=0) + 1
        numbers = tuple(value.number for value in going)
        steps.append(Instruction("send", numbers, (made,), named={"to": place.rank + 1}))
    return program(steps, (), made)


def _as_it_is(call: Call) -> Instruction:
    """What a rank does that has all of what it needs."""
    inputs, outputs = (tuple(value.number for value in values) for values in (call.inputs, call.outputs))
    return Instruction(call.op, inputs, outputs, call.args, call.named)


def _words(calls: Sequence[Call], given: Value, scores: Value, place: Place) -> Program:
    """The first rank's: the hidden states of the wanted places come from the last rank."""
    like = scores.number + 1
    steps = [
        Instruction("receive", (like,), (given.number,), named={"widths": (given.width,), "source": place.ranks - 1})
    ]
    steps += [_as_it_is(call) for call in calls]
    return program(steps, (like,), scores.number)
