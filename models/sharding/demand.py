"""How each value of a recorded pass had best lie on the ranks, told by what is done with it, from the last one back.

Attention asks for whole heads, an elementwise operation for what is asked of it, a matrix for whole groups of its
quantisation, a norm over the whole width for all of it. A wish is no promise: who makes the value decides, and what
finds it otherwise has it gathered.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm

from models.ops import Attention, DeltaRule, Embedding, Joined, LatentAttention, Linear, Norm, StateSpace
from models.sharding.record import Call, Value


@dataclass(frozen=True, slots=True)
class Wish:
    """That a span be cut between its units; a span of one unit is whole."""

    width: int
    unit: int = 1
    is_hard: bool = False
    """The units are heads, and the operation that asks is what the cutting is about."""
    may_repeat: bool = False
    """Where there are fewer units than ranks, neighbours have the same one."""
    what: str = ""
    """What the units are, for messages."""

    @property
    def is_whole(self) -> bool:
        """Every rank shall have all of it."""
        return self.unit >= self.width


Demand = tuple[Wish, ...]


def _all_of(width: int) -> Demand:
    return (Wish(width, width),)


def is_whole(demand: Demand) -> bool:
    """Whether every rank shall have all of it."""
    return all(wish.is_whole for wish in demand)


@dataclass(slots=True)
class Demands:
    """What is asked of each value, by number; nothing of those that nobody uses."""

    group_of: Callable[[str], int]
    """Of how many neighbours along its inputs the matrix of that name holds together."""
    _wishes: dict[int, Demand] = field(default_factory=dict)
    _by_heads: set[int] = field(default_factory=set)

    def of(self, value: Value) -> Demand:
        """What is asked of a value."""
        return self._wishes.get(value.number, (Wish(value.width),))

    def ask(self, value: Value, demand: Demand) -> None:
        """Ask besides what others ask."""
        assert sum(wish.width for wish in demand) == value.width
        known = self._wishes.get(value.number)
        self._wishes[value.number] = demand if known is None else _merged(known, demand, value.width)

    def is_by_heads(self, value: Value) -> bool:
        """Whether each head's operation made it, so that it is cut whatever is asked."""
        return value.number in self._by_heads

    def read(self, calls: Sequence[Call]) -> None:
        """Go through a recorded pass from its end."""
        for call in calls:
            if call.op in _BY_HEADS or (call.op in _KEEPING and any(self.is_by_heads(each) for each in call.inputs)):
                self._by_heads.update(value.number for value in call.outputs)
        for call in reversed(calls):
            _RULES.get(call.op, _passed_on)(self, call)


def _merged(known: Demand, more: Demand, width: int) -> Demand:
    if is_whole(known) or is_whole(more):
        return _all_of(width)
    if len(known) == 1 and len(more) > 1:
        known, more = more, known
    if len(more) == 1 and len(known) > 1 and not more[0].is_hard:
        more = tuple(replace(more[0], width=wish.width) for wish in known)
    if [wish.width for wish in known] != [wish.width for wish in more]:
        return _all_of(width)
    return tuple(_both(a, b) for a, b in zip(known, more, strict=True))


def _both(a: Wish, b: Wish) -> Wish:
    firm = a if a.is_hard or not b.is_hard else b
    return replace(
        firm, unit=min(lcm(a.unit, b.unit), a.width), is_hard=a.is_hard or b.is_hard, may_repeat=firm.may_repeat
    )


def heads(width: int, count: int, what: str, *, may_repeat: bool = False) -> Demand:
    """That so many heads stay whole."""
    return (Wish(width, width // count, is_hard=True, may_repeat=may_repeat, what=what),)


def _within(demand: Demand, width: int) -> Demand:
    """The same where groups of so many neighbours stay whole."""
    return tuple(replace(wish, unit=min(lcm(wish.unit, width), wish.width)) for wish in demand)


def _passed_on(demands: Demands, call: Call) -> None:
    """What is asked of the result of an elementwise operation is asked of what goes in."""
    if not call.outputs:
        return
    for value in call.inputs:
        if value.width == call.outputs[0].width:
            demands.ask(value, demands.of(call.outputs[0]))
        else:
            demands.ask(value, _all_of(value.width))


def _wholly(demands: Demands, call: Call) -> None:
    for value in call.inputs:
        demands.ask(value, _all_of(value.width))


def _linear(demands: Demands, call: Call) -> None:
    (x,), matrix = call.inputs, call.args[0]
    if isinstance(matrix, Embedding):
        demands.ask(x, _all_of(x.width))
        return
    assert isinstance(matrix, Linear | Joined)
    parts = matrix.parts if isinstance(matrix, Joined) else (matrix,)
    unit = lcm(*(demands.group_of(part.name) for part in parts))
    demands.ask(x, (Wish(x.width, min(unit, x.width), what=f"groups of {unit} inputs of {parts[0].name}"),))


def _split(demands: Demands, call: Call) -> None:
    (x,), (sizes, count) = call.inputs, call.args
    assert isinstance(count, int)
    asked = [demands.of(value) for value in call.outputs]
    if count == 1:
        demands.ask(x, tuple(wish for demand in asked for wish in demand))
        return
    assert isinstance(sizes, tuple)
    if any(len(demand) > 1 or demand[0].is_whole for demand in asked):
        demands.ask(x, _all_of(x.width))
        return
    together = lcm(*(lcm(demand[0].unit, size) // size for demand, size in zip(asked, sizes, strict=True)))
    firm = next((demand[0] for demand in asked if demand[0].is_hard), asked[0][0])
    may_repeat = all(demand[0].may_repeat for demand in asked)
    unit = min(together * sum(sizes), x.width)
    demands.ask(x, (replace(firm, width=x.width, unit=unit, may_repeat=may_repeat),))


def _join(demands: Demands, call: Call) -> None:
    count = call.args[0]
    assert isinstance(count, int)
    asked = demands.of(call.outputs[0])
    if count > 1:
        for value in call.inputs:
            if len(asked) > 1 or asked[0].is_whole:
                demands.ask(value, _all_of(value.width))
                continue
            size, every = value.width // count, call.outputs[0].width // count
            unit = lcm(asked[0].unit, every) // every * size
            demands.ask(value, (replace(asked[0], width=value.width, unit=min(unit, value.width)),))
        return
    if len(asked) == 1 and not asked[0].is_whole and (len(call.inputs) == 1 or not asked[0].is_hard):
        for value in call.inputs:
            demands.ask(value, (replace(asked[0], width=value.width, unit=min(asked[0].unit, value.width)),))
        return
    left = list(asked)
    for value in call.inputs:
        own: list[Wish] = []
        while left and sum(wish.width for wish in own) < value.width:
            own.append(left.pop(0))
        fits = sum(wish.width for wish in own) == value.width
        demands.ask(value, tuple(own) if fits else _all_of(value.width))
        left = left if fits else []


def _norm(demands: Demands, call: Call) -> None:
    (x,), norm = call.inputs, call.args[0]
    asked = demands.of(call.outputs[0])
    width = getattr(norm, "width", 0)
    if demands.is_by_heads(x) and not is_whole(asked):
        demands.ask(x, asked)
    elif width < x.width:
        demands.ask(x, _within(asked, width))
    elif isinstance(norm, Norm) and all(wish.is_hard for wish in asked):
        # Of heads that are normed together each rank adds its share of the squares.
        demands.ask(x, asked)
    else:
        demands.ask(x, _all_of(x.width))


def _rotate(demands: Demands, call: Call) -> None:
    (x,), count = call.inputs, call.args[0]
    assert isinstance(count, int)
    demands.ask(x, _within(demands.of(call.outputs[0]), x.width // count))


def _mul(demands: Demands, call: Call) -> None:
    x, y = call.inputs
    asked = demands.of(call.outputs[0])
    if y.width == x.width:
        demands.ask(x, asked)
        demands.ask(y, asked)
    elif y.width == 1:
        demands.ask(x, asked)
        demands.ask(y, _all_of(1))
    else:
        ratio = x.width // y.width
        within = _within(asked, ratio)
        demands.ask(x, within)
        one = len(within) == 1 and not within[0].is_whole
        demands.ask(y, (replace(within[0], width=y.width, unit=within[0].unit // ratio),) if one else _all_of(y.width))


def _attention(demands: Demands, call: Call) -> None:
    spec = call.args[1]
    assert isinstance(spec, Attention)
    q, *kv = call.inputs
    demands.ask(q, heads(q.width, spec.heads, "attention heads"))
    for value in kv:
        demands.ask(value, heads(value.width, spec.kv_heads, "key-value heads", may_repeat=True))


def _latent(demands: Demands, call: Call) -> None:
    spec = call.args[2]
    assert isinstance(spec, LatentAttention)
    q, latent = call.inputs
    demands.ask(q, heads(q.width, spec.heads, "attention heads"))
    demands.ask(latent, _all_of(latent.width))


def _delta(demands: Demands, call: Call) -> None:
    spec = call.named["spec"]
    assert isinstance(spec, DeltaRule)
    q, k, *others = call.inputs
    for value in (q, k):
        demands.ask(value, heads(value.width, spec.key_heads, "key heads of a delta rule", may_repeat=True))
    for value in others:
        demands.ask(value, heads(value.width, spec.heads, "heads of a delta rule"))


def _space(demands: Demands, call: Call) -> None:
    spec = call.named["spec"]
    assert isinstance(spec, StateSpace)
    x, b, c, dt = call.inputs
    for value in (x, dt):
        demands.ask(value, heads(value.width, spec.heads, "heads of a state space"))
    for value in (b, c):
        demands.ask(value, heads(value.width, spec.groups, "groups of a state space", may_repeat=True))


_BY_HEADS = frozenset({"attention", "look_again", "latent_attention", "delta_rule", "state_space"})
_KEEPING = frozenset({"rms_norm", "layer_norm", "weigh", "glu", "mul", "activate", "scale", "split", "join"})
_RULES: Mapping[str, Callable[[Demands, Call], None]] = {
    "linear": _linear,
    "split": _split,
    "join": _join,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "rotate": _rotate,
    "mul": _mul,
    "attention": _attention,
    "look_again": _attention,
    "latent_attention": _latent,
    "delta_rule": _delta,
    "state_space": _space,
    "route": _wholly,
    "experts": _wholly,
    "mix": _wholly,
    "match_size": _wholly,
    "rise_above": _wholly,
}
