"""Experts' nodes: a router's choice, and a branch an expert that runs where some token picked it.

Each expert is two products like any other, in its file's bits; one that nobody picked costs a microsecond. What the
experts make of a token is summed in their order, so that the sum does not depend on the other tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np

from models.executors.onnx.graph import Branch, Graph
from models.executors.onnx.products import ProductNodes
from models.ops import Activation, ClampedSwish, Expert, Experts, Gate, Joined, Linear, Routing

FLOAT = np.dtype(np.float32)
TOGETHER = 16
"""Experts whose conditions are made at once: few values cross where a graph is cut between them."""


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
        graph, count = self._graph, len(experts.each)
        shape = graph.add("Concat", [graph.add("Shape", [x], start=0, end=1)[0], self._whole(count)], axis=0)[0]
        (nothing,) = graph.add("ConstantOfShape", [shape])
        (spread,) = graph.add("ScatterElements", [nothing, picks, weights], axis=1)
        (mine,) = graph.add("Transpose", [spread], perm=[1, 0])
        (most,) = graph.add("ReduceMax", [mine, self._whole(1)], keepdims=0)
        (used,) = graph.add("Greater", [most, self._number(0.0)])
        graph.kinds[used] = np.dtype(np.bool_)
        (total,) = graph.add("ConstantOfShape", [graph.add("Shape", [x])[0]])
        conditions: list[str] = []
        for index, expert in enumerate(experts.each):
            if index == len(conditions):
                conditions += self._conditions(used, index, min(index + TOGETHER, count))
            condition = conditions[index]
            number = graph.constant(np.array(index, np.int64))
            then = self._branch((x, total), (mine, number), expert, activation, on_input=on_input)
            total = graph.choose(condition, then, self._same(total))
        return total

    def _conditions(self, used: str, begin: int, end: int) -> list[str]:
        """Whether each of some experts runs. Shapes: used bool (experts,); one value each."""
        graph = self._graph
        (own,) = graph.add("Slice", [used, self._whole(begin), self._whole(end)])
        conditions = graph.add("Split", [own], outputs=end - begin, num_outputs=end - begin, axis=0)
        graph.kinds |= dict.fromkeys(conditions, np.dtype(np.bool_))
        return conditions

    def _branch(
        self, values: tuple[str, str], own_row: tuple[str, str], expert: Expert, activation: Gate, *, on_input: bool
    ) -> Branch:
        """One expert's share added to the total. Shapes: x and total (T, D); weights (experts, T) and which row."""
        graph, (x, total) = self._graph, values

        def record() -> str:
            (weight,) = graph.add("Gather", own_row, axis=0)
            (rows,) = graph.add("Reshape", [graph.add("NonZero", [weight])[0], self._whole(-1)])
            (own,) = graph.add("Gather", [x, rows], axis=0)
            (factors,) = graph.add("Unsqueeze", [graph.add("Gather", [weight, rows], axis=0)[0], self._whole(1)])
            if on_input:
                share = self._computed(graph.add("Mul", [own, factors])[0], expert, activation)
            else:
                (share,) = graph.add("Mul", [self._computed(own, expert, activation), factors])
            (places,) = graph.add("Unsqueeze", [rows, self._whole(1)])
            return graph.add("ScatterND", [total, places, share], reduction="add")[0]

        return graph.branch(record)

    def _same(self, total: str) -> Branch:
        return self._graph.branch(lambda: self._graph.add("Identity", [total])[0])

    def _computed(self, x: str, expert: Expert, activation: Gate) -> str:
        """An MLP. Shapes: (n, D) both ways."""
        graph = self._graph
        if not self._products.wants_even_rows((*expert.gate_up.parts, expert.down)):
            return self._products.record(self._within(x, expert.gate_up, activation), (expert.down,))
        # Every token twice: an odd last row would be summed in another order.
        (twice,) = graph.add("Concat", [x, x], axis=0)
        made = self._products.record(self._within(twice, expert.gate_up, activation), (expert.down,))
        return graph.add("Split", [made], outputs=2, num_outputs=2, axis=0)[0]

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

    def _number(self, value: float) -> str:
        return self._graph.constant(np.array(value, FLOAT))
