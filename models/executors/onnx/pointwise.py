"""Nodes of what is computed token by token and is no product with a weight: activations, streams mixed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.executors.onnx.graph import CONTRIB, Graph
from models.ops import Activation, ClampedSwish, Gate

FLOAT = np.dtype(np.float32)
_SINGLE, _DOUBLE = 1, 11
"""ONNX's numbers of the types. Source: onnx 1.23, TensorProto.DataType."""
_ACTIVATIONS: Mapping[Activation, tuple[str, str, dict[str, Any]]] = {
    "silu": ("QuickGelu", CONTRIB, {"alpha": 1.0}),
    "gelu": ("Gelu", "", {}),
    "gelu_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "relu": ("Relu", "", {}),
    "sigmoid": ("Sigmoid", "", {}),
    "tanh": ("Tanh", "", {}),
}


class PointwiseNodes:
    """Records them; values are names. Thread: any."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def activated(self, x: str, activation: Activation) -> str:
        """Shapes: (n, F) both ways."""
        if activation == "relu2":
            positive = self.activated(x, "relu")
            return self._graph.add("Mul", [positive, positive])[0]
        if activation == "softplus":
            return self._softplus(x)
        op, domain, attributes = _ACTIVATIONS[activation]
        return self._graph.add(op, [x], domain=domain, **attributes)[0]

    def gated(self, gate: str, up: str, activation: Gate) -> str:
        """The activated gate times `up`. Shapes: (n, F) all."""
        add = self._graph.add
        if not isinstance(activation, ClampedSwish):
            return add("Mul", [self.activated(gate, activation), up])[0]
        low, high = self._number(-activation.limit), self._number(activation.limit)
        (active,) = add("QuickGelu", [add("Min", [gate, high])[0]], domain=CONTRIB, alpha=activation.alpha)
        (shifted,) = add("Add", [add("Clip", [up, low, high])[0], self._number(activation.shift)])
        return add("Mul", [active, shifted])[0]

    def scaled(self, x: str, factors: str, groups: int) -> str:
        """Each of so many groups of neighbours times its factor. Shapes: x (T, groups * d), factors (T, groups)."""
        (parted,) = self._graph.add("Reshape", [x, self._whole(0, groups, -1)])
        (column,) = self._graph.add("Unsqueeze", [factors, self._whole(2)])
        (made,) = self._graph.add("Mul", [parted, column])
        return self._graph.add("Reshape", [made, self._whole(0, -1)])[0]

    def xielu(self, x: str, above: str, below: str, slope: str, least: str) -> str:
        """See `Xielu`. Shapes: x (T, F), the others numbers; (T, F)."""
        add = self._graph.add
        rises = add("Softplus", [above])[0]
        falls = add("Add", [slope, add("Softplus", [below])[0]])[0]
        (square,) = add("Mul", [add("Mul", [rises, x])[0], x])
        (power,) = add("Sub", [add("Exp", [add("Min", [x, least])[0]])[0], self._number(1.0)])
        (bent,) = add("Mul", [add("Sub", [power, x])[0], falls])
        (curve,) = add("Where", [add("Greater", [x, self._number(0.0)])[0], square, bent])
        return add("Add", [curve, add("Mul", [slope, x])[0]])[0]

    def mixed(self, x: str, weights: str, parts: int, made: int) -> str:
        """See `Ops.mix`. Shapes: x (T, parts * D), weights (T, made * parts); (T, made * D)."""
        (streams,) = self._graph.add("Reshape", [x, self._whole(0, parts, -1)])
        (each,) = self._graph.add("Reshape", [weights, self._whole(0, made, parts)])
        (mixed,) = self._graph.add("MatMul", [each, streams])
        return self._graph.add("Reshape", [mixed, self._whole(0, -1)])[0]

    def matched(self, x: str, like: str, floor: float) -> str:
        """See `Ops.match_size`. Shapes: (T, D) both; (T, D)."""
        add = self._graph.add
        own = add("Max", [self._mean_square(x), self._number(floor)])[0]
        (ratio,) = add("Sqrt", [add("Div", [self._mean_square(like), own])[0]])
        return add("Mul", [x, ratio])[0]

    def risen(self, x: str, deviations: float) -> str:
        """See `Ops.rise_above`. Shapes: (T, F) both ways."""
        add = self._graph.add
        (centred,) = add("Sub", [x, add("ReduceMean", [x, self._whole(-1)], keepdims=1)[0]])
        (spread,) = add("Sqrt", [self._mean_square(centred)])
        (least,) = add("Mul", [spread, self._number(deviations)])
        return add("Relu", [add("Sub", [centred, least])[0]])[0]

    def _softplus(self, x: str) -> str:
        """The value max(x, 0) + log(1 + exp(-|x|)), by float64.

        ONNX Runtime's own Softplus and Log round the last few values of an array otherwise than the rest, so that a
        token's bits would hang on how many others there are: in bits that float32 does not have, here.
        """
        add = self._graph.add
        (wide,) = add("Cast", [x], to=_DOUBLE)
        (small,) = add("Exp", add("Neg", add("Abs", [wide])))
        one = self._graph.constant(np.array(1, np.float64))
        (rest,) = add("Log", add("Add", [small, one]))
        return add("Cast", add("Add", [*add("Relu", [wide]), rest]), to=_SINGLE)[0]

    def _mean_square(self, x: str) -> str:
        (square,) = self._graph.add("Mul", [x, x])
        return self._graph.add("ReduceMean", [square, self._whole(-1)], keepdims=1)[0]

    def _whole(self, *values: int) -> str:
        return self._graph.constant(np.array(values, np.int64))

    def _number(self, value: float) -> str:
        return self._graph.constant(np.array(value, FLOAT))
