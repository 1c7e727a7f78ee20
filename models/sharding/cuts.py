"""What a rank holds of each declared weight: a declaration of its own, and where its tensors lie in the stored ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.ops import Embedding, Experts, Joined, LatentUp, Linear, Norm, ShortConv, Vector, Weight
from models.ops.weights import Axis, Expert
from models.sharding.layout import Layout, Range, divided, local_width, ranges


@dataclass(frozen=True, slots=True)
class TensorCut:
    """A rank's part of one stored tensor. None: all of that axis."""

    rows: tuple[Range, ...] | None = None
    columns: tuple[Range, ...] | None = None
    padding: int = 0
    """Rows of zeros behind them, where an axis does not divide evenly."""
    seen_as: int = 0
    """Stored with other axes than declared: the first is this long, and the rest is the second."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of a declared weight."""

    local: Weight
    tensors: Mapping[str, TensorCut]
    """By the names that both declarations have; of those that are not here, all of them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank of how many."""

    rank: int
    ranks: int

    def rows(self, layout: Layout) -> TensorCut:
        """The rank's part of a tensor whose first axis lies so."""
        own = tuple(ranges(layout, self.rank, self.ranks))
        return TensorCut(rows=own, padding=local_width(layout) - sum(end - begin for begin, end in own))

    def columns(self, layout: Layout) -> TensorCut:
        """The rank's part of a tensor whose second axis lies so."""
        return TensorCut(columns=tuple(ranges(layout, self.rank, self.ranks)))


def key_of(weight: Weight) -> str:
    """What a declared weight is known by: the name of its first tensor; empty where it has none."""
    return next((name for name, _ in weight.tensors()), "")


def by_outputs(weight: Linear | Joined, layout: Layout, place: Place) -> Share:
    """Some of a matrix's rows, and of its bias; of several the layout is that of what they make side by side."""
    if isinstance(weight, Joined):
        parts = divided(layout, weight.sizes)
        assert parts is not None
        return _together(weight, [by_outputs(part, own, place) for part, own in zip(weight.parts, parts, strict=True)])
    _check(weight.may_be_cut, "outputs")
    own = place.rows(layout)
    return Share(replace(weight, outputs=local_width(layout)), {name: own for name, _ in weight.tensors()})


def by_inputs(weight: Linear | Joined, layout: Layout, place: Place) -> Share:
    """Some of a matrix's columns. What the ranks make is added up, so the first alone has the bias."""
    if isinstance(weight, Joined):
        return _together(weight, [by_inputs(part, layout, place) for part in weight.parts])
    _check(weight.may_be_cut, "inputs")
    local = replace(weight, inputs=local_width(layout), bias=weight.bias and place.rank == 0)
    return Share(local, {f"{weight.name}.weight": place.columns(layout)})


def table(weight: Embedding, layout: Layout, place: Place) -> Share:
    """Some of a table's rows."""
    _check(weight.may_be_cut, "rows")
    return Share(replace(weight, rows=local_width(layout)), {f"{weight.name}.weight": place.rows(layout)})


def experts_by_width(weight: Experts, layout: Layout, place: Place) -> Share:
    """Some of every expert's columns."""
    _check(weight.may_be_cut, "columns")
    each: list[Expert] = []
    tensors: dict[str, TensorCut] = {}
    for expert in weight.each:
        up = by_outputs(expert.gate_up, layout * len(expert.gate_up.parts), place)
        down = by_inputs(expert.down, layout, place)
        assert isinstance(up.local, Joined)
        assert isinstance(down.local, Linear)
        each.append(Expert(up.local, down.local))
        tensors |= up.tensors
        tensors |= down.tensors
    return Share(Experts(tuple(each)), tensors)


def experts_spread(weight: Experts, place: Place) -> Share:
    """Some of the experts, whole."""
    _check(weight.may_be_cut, "experts")
    count = len(weight.each) // place.ranks
    return Share(Experts(weight.each[place.rank * count : (place.rank + 1) * count]), {})


def vector(weight: Vector | Norm | ShortConv | LatentUp, layout: Layout, place: Place) -> Share:
    """Some of what is stored along one axis."""
    match weight:
        case ShortConv():
            _check(weight.may_be_cut, "channels")
            local: Weight = replace(weight, channels=local_width(layout))
            own = replace(place.rows(layout), seen_as=weight.channels)
            return Share(local, {name: own for name, _ in weight.tensors()})
        case LatentUp():
            # The layout is that of heads.
            _check(weight.may_be_cut, "heads")
            each = weight.key_dim + weight.value_dim
            local = replace(weight, heads=local_width(layout))
            size = 1 if weight.divided else each
            rows = tuple((begin * size, end * size) for begin, end in ranges(layout, place.rank, place.ranks))
            return Share(local, {name: TensorCut(rows=rows) for name, _ in weight.tensors()})
        case _:
            # Stored as a row, as a column or as it is.
            _check(weight.may_be_cut, "width")
            own = replace(place.rows(layout), seen_as=weight.width)
            return Share(replace(weight, width=local_width(layout)), {name: own for name, _ in weight.tensors()})


def _together(weight: Joined, shares: list[Share]) -> Share:
    parts = tuple(share.local for share in shares if isinstance(share.local, Linear))
    tensors = {name: cut for share in shares for name, cut in share.tensors.items()}
    return Share(replace(weight, parts=parts), tensors)


def _check(may_be_cut: tuple[Axis, ...], axis: Axis) -> None:
    assert axis in may_be_cut, f"a weight that says {may_be_cut} is cut by its {axis}"
