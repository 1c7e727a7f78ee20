"""Recurrent layers' nodes: short convolutions, the gated delta rule and state spaces, over a step's flat tokens.

GatedDeltaNet takes rows of any lengths behind one another and sums each token by itself, so a row's state is the same
to the last bit however it is cut into steps and whatever runs beside it. A convolution picks each tap's inputs by
index, from the row's own tokens or from what its state holds of earlier ones. States are bound as past and present of
one memory: everything is read before anything is written.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from models.executors.onnx import delta_scan
from models.executors.onnx.delta_scan import DeltaScan
from models.executors.onnx.graph import CONTRIB, Graph, TensorType
from models.executors.onnx.pointwise import PointwiseNodes
from models.executors.onnx.scan import MOST_TOKENS, Scan
from models.ops import DeltaRule, ShortConv, StateSpace, Vector

FLOAT, INT32, INT64, BOOL = (np.dtype(kind) for kind in (np.float32, np.int32, np.int64, np.bool_))
Attributes: TypeAlias = dict[str, int | float | str | list[int]]
ENDS, TOKENS, RUN = "ends", delta_scan.TOKENS, "tokens.run"
"""Inputs: where each slot's tokens end, int32 (B + 1,); how many there are and how many are run, int64 (1,)."""


def at_once_input(most: int) -> str:
    """The input that says whether the step is one row of a chunk of up to so many tokens. Shape: bool, ()."""
    return f"at_once.{most}"


def tap_input(taps: int, number: int) -> str:
    """The input that says where a tap's inputs lie. Shape: int64 (T,)."""
    return f"taps.{taps}.{number}"


def kept_input(taps: int) -> str:
    """The input that says what a convolution's state is made of. Shape: int64 (B, taps - 1)."""
    return f"kept.{taps}"


class RecurrentNodes:
    """Records recurrent layers. Thread: any."""

    def __init__(
        self, graph: Graph, pointwise: PointwiseNodes, vector: Callable[[Vector], str], *, even: bool, exact: bool
    ) -> None:
        """Record into `graph`, which `vector` gives vectors.

        Where `even`, a step may run its last token once more, which no state may see. Where `exact`, the cuts of a row
        change no bit of its state spaces either; a prompt takes longer.
        """
        self._exact = exact
        self._graph = graph
        self._pointwise = pointwise
        self._vector = vector
        self._even = even
        self.convolutions: list[ShortConv] = []

    def convolution(self, x: str, conv: ShortConv, layer: int) -> str:
        """See `Ops.short_conv`. Shapes: x (T, C); returns the result's name, (T, C)."""
        graph, earlier = self._graph, conv.taps - 1
        self.convolutions.append(conv)
        for name, nbytes in conv_nbytes(conv):
            graph.weights[name] = nbytes
        past, present = self._state(conv.shape, layer)
        (flat,) = graph.add("Reshape", [past, self._shape(-1, conv.channels)])
        (inputs,) = graph.add("Concat", [flat, x], axis=0)
        parts: list[str] = []
        for number in range(earlier):
            index = self._input(tap_input(conv.taps, number), TensorType(INT64, ("T",)))
            (picked,) = graph.add("Gather", [inputs, index], axis=0)
            parts += graph.add("Mul", [picked, tap_weight(conv, number)])
        parts += graph.add("Mul", [x, tap_weight(conv, earlier)])
        kept = self._input(kept_input(conv.taps), TensorType(INT64, ("B", earlier)))
        graph.append_node("Gather", [inputs, kept], [present], "", {"axis": 0})
        return graph.add("Sum", [*parts, f"{conv.name}.bias"] if conv.bias else parts)[0]

    def delta_rule(self, parts: Sequence[str], layer: int, spec: DeltaRule) -> str:
        """See `Ops.delta_rule`. `parts`: q, k, v, a and b; returns the result's name, (T, heads * value_dim)."""
        queries, keys, values, decay, beta = (self._own(part) for part in parts)
        queries, keys = (
            self._normed(self._divided(part, spec.key_heads, spec.key_dim), spec) for part in (queries, keys)
        )
        inputs = [queries, keys, self._divided(values, spec.heads, spec.value_dim)]
        vectors = [self._vector(spec.a_log), self._vector(spec.dt_bias)]
        past, present = self._state(spec.shape, layer)
        attributes: Attributes = {
            "update_rule": "gated_delta",
            "scale": spec.key_dim**-0.5,
            "gate_activation": "softplus",
            "beta_activation": "sigmoid",
        }
        names = [*inputs, self._ends(), decay, beta, past, *vectors]

        def at_once() -> tuple[str, str]:
            self._input(delta_scan.PADS, TensorType(INT64, (6,)))
            self._input(TOKENS, TensorType(INT64, (1,)))
            return DeltaScan(self._graph, self._pointwise, spec).record(inputs, [decay, beta], vectors, past)

        made = self._chosen(names, attributes, present, delta_scan.MOST_TOKENS, at_once)
        return self._flat(made, spec.heads * spec.value_dim)

    def state_space(self, parts: Sequence[str], layer: int, spec: StateSpace) -> str:
        """See `Ops.state_space`. `parts`: x, b, c and dt; returns the result's name, (T, heads * head_dim)."""
        add = self._graph.add
        x, b, c, dt = (self._own(part) for part in parts)
        steps = self._pointwise.activated(add("Add", [dt, self._vector(spec.dt_bias)])[0], "softplus")
        if spec.least_dt > 0 or np.isfinite(spec.most_dt):
            bounds = [self._graph.constant(np.array(value, FLOAT)) for value in (spec.least_dt, spec.most_dt)]
            (steps,) = add("Clip", [steps, *bounds])
        values = self._divided(x, spec.heads, spec.head_dim)
        last = self._shape(-1)
        (weighed,) = add("Mul", [values, add("Unsqueeze", [steps, last])[0]])
        inputs = [*(self._divided(part, spec.groups, spec.state_dim) for part in (c, b)), weighed]
        decay, (past, present) = self._decay(steps, spec.a_log), self._state(spec.shape, layer)

        names = [*inputs, self._ends(), decay, "", past]
        attributes: Attributes = {"update_rule": "gated", "scale": 1.0}
        scan = Scan(self._graph, spec)
        made = self._chosen(names, attributes, present, MOST_TOKENS, lambda: scan.record(inputs, decay, past))
        (skip,) = add("Unsqueeze", [self._vector(spec.d), last])
        (whole,) = add("Add", [made, add("Mul", [values, skip])[0]])
        return self._flat(whole, spec.heads * spec.head_dim)

    def _chosen(
        self, names: list[str], attributes: Attributes, present: str, most: int, at_once: Callable[[], tuple[str, str]]
    ) -> str:
        """The tokens in turn by the kernel, or a chunk of up to so many `at_once`; the output's name."""
        graph, made = self._graph, self._graph.name("recurrence")
        if self._exact:
            graph.append_node("GatedDeltaNet", names, [made, present], CONTRIB, attributes)
            return made

        def in_turn() -> tuple[str, str]:
            outputs = (graph.name("each"), graph.name("state"))
            graph.append_node("GatedDeltaNet", names, outputs, CONTRIB, attributes)
            return outputs

        condition = self._input(at_once_input(most), TensorType(BOOL, ()))
        return graph.choose(condition, graph.branch(at_once), graph.branch(in_turn), made, present)

    def _ends(self) -> str:
        return self._input(ENDS, TensorType(INT32, ("B+1",)))

    def _state(self, shape: tuple[int, ...], layer: int) -> tuple[str, str]:
        """The names of a layer's state before the step and behind it."""
        names = (f"past.{state_name(layer)}", f"present.{state_name(layer)}")
        self._graph.inputs[names[0]] = self._graph.outputs[names[1]] = TensorType(FLOAT, ("B", *shape))
        return names

    def _own(self, x: str) -> str:
        """The step's tokens, without one that is run once more."""
        if not self._even:
            return x
        tokens = self._input(TOKENS, TensorType(INT64, (1,)))
        return self._graph.add("Slice", [x, self._shape(0), tokens, self._shape(0)])[0]

    def _flat(self, x: str, width: int) -> str:
        """Shapes: (T', H, d); (T, H * d)."""
        (flat,) = self._graph.add("Reshape", [x, self._shape(-1, width)])
        if not self._even:
            return flat
        (last,) = self._graph.add("Slice", [flat, *(self._shape(value) for value in (-1, 2**62, 0))])
        (more,) = self._graph.add("Concat", [flat, last], axis=0)
        run = self._input(RUN, TensorType(INT64, (1,)))
        return self._graph.add("Slice", [more, self._shape(0), run, self._shape(0)])[0]

    def _divided(self, x: str, heads: int, dim: int) -> str:
        return self._graph.add("Reshape", [x, self._shape(-1, heads, dim)])[0]

    def _normed(self, x: str, spec: DeltaRule) -> str:
        """Each head divided by its length: what an RMSNorm gives, by the root of its width."""
        share = self._graph.constant(np.full(spec.key_dim, spec.key_dim**-0.5, FLOAT))
        eps = spec.eps / spec.key_dim
        return self._graph.add("SimplifiedLayerNormalization", [x, share], axis=-1, epsilon=eps)[0]

    def _decay(self, steps: str, a_log: Vector) -> str:
        """The logarithm of the decay, -exp(a_log) times the steps. Shapes: (T', H) both ways."""
        (rates,) = self._graph.add("Exp", [self._vector(a_log)])
        return self._graph.add("Neg", [self._graph.add("Mul", [steps, rates])[0]])[0]

    def _shape(self, *lengths: int) -> str:
        return self._graph.constant(np.array(lengths, np.int64))

    def _input(self, name: str, kind: TensorType) -> str:
        self._graph.inputs[name] = kind
        return name


def state_name(layer: int) -> str:
    """What a layer's state is called among the graph's values."""
    return f"state.{layer}"


def tap_weight(conv: ShortConv, number: int) -> str:
    """The array that the graph is given of a tap. Shape: (C,)."""
    return f"{conv.name}.tap.{number}"


def conv_nbytes(conv: ShortConv) -> list[tuple[str, int]]:
    """The arrays that the graph is given of a convolution, and their bytes."""
    names = [tap_weight(conv, number) for number in range(conv.taps)] + [f"{conv.name}.bias"] * conv.bias
    return [(name, 4 * conv.channels) for name in names]
