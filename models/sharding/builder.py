"""One rank's instructions in the making: under which number, and how, the rank has each value of a recorded pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from models.ops import LayerState, Weight
from models.sharding.cuts import Place, Share, key_of
from models.sharding.demand import Demand, Demands, Wish
from models.sharding.layout import Layout, Span, is_whole, joined, whole
from models.sharding.program import Instruction, Message
from models.sharding.record import Value

GroupOf = Callable[[str], int]


class Indivisible(Exception):
    """Something cannot be shared by so many ranks; the message says what."""


@dataclass(frozen=True, slots=True)
class Held:
    """A recorded value as a rank has it: under which number, how it lies, and whether it has yet to be summed."""

    number: int
    layout: Layout
    is_part: bool = False


@dataclass(slots=True)
class Builder:
    """One rank's instructions in the making."""

    place: Place
    hidden: int
    group_of: GroupOf
    state: list[LayerState]
    shares: dict[str, Share] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    demands: Demands = field(init=False)
    _values: dict[int, Held] = field(default_factory=dict)
    _made: dict[tuple[int, Layout], int] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self.demands = Demands(self.group_of)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.place.ranks

    def fresh(self) -> int:
        """The number of a new value."""
        self._count += 1
        return self._count - 1

    def emit(
        self,
        op: str,
        inputs: Sequence[int],
        *args: object,
        count: int = 1,
        named: Mapping[str, object] | None = None,
    ) -> tuple[int, ...]:
        """Append an instruction; the numbers of what it makes."""
        outputs = tuple(self.fresh() for _ in range(count))
        self.instructions.append(Instruction(op, tuple(inputs), outputs, args, named or {}))
        return outputs

    def bind(self, value: Value, number: int, layout: Layout | None = None, *, is_part: bool = False) -> None:
        """Say what a recorded value is here; without a layout every rank has all of it."""
        self._values[value.number] = Held(number, layout or whole(value.width), is_part)

    def held(self, value: Value) -> Held:
        """What a recorded value is here."""
        return self._values[value.number]

    def settled(self, value: Value) -> Held:
        """The same, summed up."""
        held = self.held(value)
        if not held.is_part:
            return held
        (number,) = self.emit("sum", [held.number])
        self.note("sum", value.width)
        self.bind(value, number)
        return self.held(value)

    def whole(self, value: Value) -> int:
        """The number of all of a value."""
        held = self.settled(value)
        if is_whole(held.layout):
            return held.number
        return self._once(held.number, whole(value.width), lambda: self._gathered(held))

    def cut(self, value: Value, layout: Layout) -> int:
        """The number of a value that lies so."""
        held = self.settled(value)
        if held.layout == layout:
            return held.number
        number = self.whole(value)
        if is_whole(layout):
            return number
        return self._once(number, layout, lambda: self.emit("own", [number], layout)[0])

    def again_cut(self, number: int, layout: Layout) -> int:
        """The number of a whole value's own part."""
        return self.emit("own", [number], layout)[0]

    def share(self, weight: Weight, share: Share) -> Weight:
        """Say what this rank holds of a weight; what it is declared as here."""
        known = self.shares.setdefault(key_of(weight), share)
        if known != share:
            raise Indivisible(f"{key_of(weight)} is used in two ways")
        return share.local

    def _once(self, number: int, layout: Layout, make: Callable[[], int]) -> int:
        key = number, layout
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _gathered(self, held: Held) -> int:
        self.note("gather", sum(span.width for span in held.layout))
        return self.emit("gather", [held.number], held.layout)[0]

    def layout_of(self, demand: Demand) -> Layout:
        """How a value lies of which this is asked.

        Raises:
            Indivisible: its units do not divide among the ranks.
        """
        return joined([(Span(wish.width, self._pieces(wish)),) for wish in demand])

    def _pieces(self, wish: Wish) -> int:
        ranks, units = self.ranks, wish.width // wish.unit
        if wish.width % wish.unit == 0 and units % ranks == 0:
            return ranks
        if wish.is_whole or (wish.may_repeat and ranks % units == 0):
            return units if wish.may_repeat and not wish.is_whole else 1
        if not wish.is_hard and wish.width < 16 * ranks:
            return 1
        if wish.is_hard:
            raise Indivisible(f"{units} {wish.what} do not divide")
        raise Indivisible(f"{wish.width} values in {wish.what or f'units of {wish.unit}'} do not divide")

    def note(self, kind: str, width: int) -> None:
        """Count what an instruction says to the other ranks."""
        self.messages.append(Message(kind, width))

    def heads(self, count: int, what: str) -> int:
        """How many of so many heads each rank has. Raises Indivisible."""
        if count % self.ranks:
            raise Indivisible(f"{count} {what} do not divide")
        return count // self.ranks

    def repeated(self, count: int, what: str) -> int:
        """Into how many pieces heads are cut that neighbours may have in common. Raises Indivisible."""
        if count % self.ranks == 0:
            return self.ranks
        if self.ranks % count == 0:
            return count
        raise Indivisible(f"{count} {what} neither divide nor are repeated evenly")
