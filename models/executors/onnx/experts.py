"""Experts' nodes: a router's choice, and a branch an expert that runs where some token picked it.

Tokens are sorted by expert once a layer. Each expert is two products like any other, in its file's bits, of rows that
lie together; one that nobody picked costs a microsecond. What the experts make of a token is summed in the order of
its picks, so that the sum does not depend on the other tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.executors.onnx.graph import Branch, Graph
from models.executors.onnx.products import ProductNodes
from models.ops import Activation, ClampedSwish, Expert, Experts, Gate, Joined, Linear, Routing

FLOAT = np.dtype(np.float32)
TOGETHER = 16
"""Experts that are in one part of a graph: their conditions and results do not cross to another."""


@dataclass(frozen=True, slots=True)
class _Order:
    """The picks (T, k) sorted by expert: int64 values' names."""

    places: str
    """Where each pick stands. Shape: (T, k)."""
    picks: str
    """Which pick stands in each row. Shape: (rows,)."""
    tokens: str
    """Whose pick that is. Shape: (rows,)."""
    begins: str
    """An expert's first row. Shape: (experts,)."""
    ends: str
    used: str
    """Whether somebody picked it, bool. Shape: (experts,)."""


class ExpertNodes:
    """Records routers and experts. Thread: any."""

    def __init__(
        self,
        graph: Graph,
        products: ProductNodes,
        glu: Callable[[str, str, Gate], str],
        activated: Callable[[str, Activation], str],
    ) -> None:
        """Record into `graph`; `glu` records an activated gate times `up`, `activated` what goes up without one."""
        self._graph = graph
        self._products = products
        self._glu = glu
        self._activated = activated

    def route(self, logits: str, count: int, routing: Routing, bias: str, scales: str) -> tuple[str, str]:
        """The names of picks and weights.

        Shapes: logits (T, count), bias and scales (count,) or no name; both (T, picked).
        """
        add = self._graph.add
        (scores,) = add("Softmax", [logits], axis=-1) if routing.score == "softmax" else add("Sigmoid", [logits])
        ranked = logits if routing.by_logits else scores
        chosen = add("Add", [ranked, bias])[0] if bias else ranked
        if routing.groups > 1:
            chosen = self._of_best_groups(chosen, count, routing)
        _, picks = add("TopK", [chosen, self._whole(routing.picked)], outputs=2, axis=-1)
        (weights,) = add("GatherElements", [scores, picks], axis=1)
        if routing.normalized:
            (total,) = add("ReduceSum", [weights, self._whole(1)], keepdims=1)
            total = add("Add", [total, self._number(routing.floor)])[0] if routing.floor else total
            (weights,) = add("Div", [weights, total])
        if routing.scale != 1:
            (weights,) = add("Mul", [weights, self._number(routing.scale)])
        if scales:
            (weights,) = add("Mul", [weights, add("Gather", [scales, picks], axis=0)[0]])
        self._graph.kinds[picks] = np.dtype(np.int64)
        return picks, weights

    def record(
        self, x: str, picks: str, weights: str, experts: Experts, activation: Gate, *, on_input: bool = False
    ) -> str:
        """The name of the weighted sum; see `Ops.experts`. Shapes: x (T, D), picks and weights (T, k); (T, D)."""
        add = self._graph.add
        with self._graph.in_one_part():
            order = self._order(picks, experts)
        (own,) = add("Gather", [x, order.tokens], axis=0)
        if on_input:
            flat = add("Reshape", [weights, self._whole(-1)])[0]
            factors = add("Gather", [flat, order.picks], axis=0)[0]
            (own,) = add("Mul", [own, add("Unsqueeze", [factors, self._whole(1)])[0]])
        (shares,) = add("Gather", [self._made(own, order, experts, activation), order.places], axis=0)
        if not on_input:
            (shares,) = add("Mul", [shares, add("Unsqueeze", [weights, self._whole(2)])[0]])
        return add("ReduceSum", [shares, self._whole(1)], keepdims=0)[0]

    def _order(self, picks: str, experts: Experts) -> "_Order":
        """Sort picks by expert, each one's by token. Shapes: picks (T, k)."""
        add, count = self._graph.add, len(experts.each)
        no_or_one = self._graph.constant(np.array([0, 1], np.int64))
        (each,) = add("OneHot", [picks, self._whole(count), no_or_one])
        (hits,) = add("ReduceSum", [each, self._whole(1)], keepdims=0)
        (earlier,) = add("CumSum", [hits, self._integer(0)], exclusive=1)
        (counts,) = add("ReduceSum", [hits, self._whole(0)], keepdims=0)
        if self._products.wants_even_rows(part for one in experts.each for part in (*one.gate_up.parts, one.down)):
            # An odd last row would be summed in another order: the first token stands below it.
            (counts,) = add("Add", [counts, add("Mod", [counts, self._integer(2)])[0]])
        (ends,) = add("CumSum", [counts, self._integer(0)])
        (begins,) = add("Sub", [ends, counts])
        (places,) = add("GatherElements", [add("Add", [earlier, begins])[0], picks], axis=1)
        (numbers,) = add("Range", [self._integer(0), add("Size", [picks])[0], self._integer(1)])
        (rows,) = add("Expand", [self._integer(0), add("Gather", [ends, self._whole(count - 1)])[0]])
        (flat,) = add("Reshape", [places, self._whole(-1)])
        (sorted_picks,) = add("ScatterElements", [rows, flat, numbers])
        (picked,) = add("Shape", [picks], start=1, end=2)
        (tokens,) = add("Div", [sorted_picks, picked])
        (used,) = add("Greater", [counts, self._integer(0)])
        self._graph.kinds |= dict.fromkeys((places, begins, ends), np.dtype(np.int64))
        self._graph.kinds[used] = np.dtype(np.bool_)
        return _Order(places, sorted_picks, tokens, begins, ends, used)

    def _made(self, own: str, order: "_Order", experts: Experts, activation: Gate) -> str:
        """What each expert makes of its rows, one expert's below the other's. Shapes: (rows, D) both ways."""
        graph, each = self._graph, experts.each
        nothing = graph.constant(np.zeros((0, each[0].down.outputs), FLOAT))
        otherwise = graph.branch(lambda: graph.add("Identity", [nothing])[0])
        groups: list[str] = []
        for first in range(0, len(each), TOGETHER):
            some = each[first : first + TOGETHER]
            with graph.in_one_part():
                conditions = self._conditions(order.used, first, first + len(some))
                made = [
                    graph.choose(condition, self._branch(own, order, first + number, expert, activation), otherwise)
                    for number, (condition, expert) in enumerate(zip(conditions, some, strict=True))
                ]
                groups += graph.add("Concat", made, axis=0)
        return graph.add("Concat", groups, axis=0)[0] if len(groups) > 1 else groups[0]

    def _conditions(self, used: str, begin: int, end: int) -> list[str]:
        """Whether each of some experts runs. Shapes: used bool (experts,); one value each."""
        graph = self._graph
        (own,) = graph.add("Slice", [used, self._whole(begin), self._whole(end)])
        conditions = graph.add("Split", [own], outputs=end - begin, num_outputs=end - begin, axis=0)
        graph.kinds |= dict.fromkeys(conditions, np.dtype(np.bool_))
        return conditions

    def _branch(self, own: str, order: "_Order", number: int, expert: Expert, activation: Gate) -> Branch:
        """One expert's MLP of its rows. Shapes: own (rows, D)."""
        graph = self._graph

        def record() -> str:
            bounds = [
                graph.add("Gather", [side, self._whole(number)], axis=0)[0] for side in (order.begins, order.ends)
            ]
            (rows,) = graph.add("Slice", [own, *bounds, self._whole(0)])
            return self._products.record(self._within(rows, expert.gate_up, activation), (expert.down,))

        return graph.branch(record)

    def _within(self, x: str, gate_up: Joined, activation: Gate) -> str:
        if len(gate_up.parts) == 1:
            assert not isinstance(activation, ClampedSwish)
            return self._activated(self._products.record(x, gate_up.parts), activation)
        gate, up = self._both(x, gate_up.parts)
        return self._glu(gate, up, activation)

    def _both(self, x: str, parts: Sequence[Linear]) -> list[str]:
        if not self._products.may_join(parts):
            return [self._products.record(x, (part,)) for part in parts]
        return self._graph.add("Split", [self._products.record(x, parts)], outputs=2, num_outputs=2, axis=1)

    def _of_best_groups(self, chosen: str, count: int, routing: Routing) -> str:
        """Scores, -inf outside of the best groups. Shapes: (T, count) both ways."""
        add = self._graph.add
        parted = self._graph.constant(np.array([-1, routing.groups, count // routing.groups], np.int64))
        (grouped,) = add("Reshape", [chosen, parted])
        best, _ = add("TopK", [grouped, self._whole(routing.best_of_group)], outputs=2, axis=-1)
        (worth,) = add("ReduceSum", [best, self._whole(2)], keepdims=0)
        least, _ = add("TopK", [worth, self._whole(routing.kept_groups)], outputs=2, axis=-1)
        (least,) = add("ReduceMin", [least, self._whole(1)], keepdims=1)
        (kept,) = add("Unsqueeze", [add("GreaterOrEqual", [worth, least])[0], self._whole(2)])
        (masked,) = add("Where", [kept, grouped, self._number(-np.inf)])
        return add("Reshape", [masked, self._graph.constant(np.array([-1, count], np.int64))])[0]

    def _whole(self, value: int) -> str:
        return self._graph.constant(np.array([value], np.int64))

    def _integer(self, value: int) -> str:
        return self._graph.constant(np.array(value, np.int64))

    def _number(self, value: float) -> str:
        return self._graph.constant(np.array(value, FLOAT))
