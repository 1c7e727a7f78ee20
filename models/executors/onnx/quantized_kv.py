"""Keys or values in 8 or 4 bits, within a graph: packed, written to slabs, and unpacked for a look.

Groups of 32 values have a scale and an offset in float32, taken from their least and greatest value. What a query sees
of the step's own tokens is rounded as well, so a row says the same however it was cut into steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.executors.onnx.graph import Graph, TensorType
from models.executors.onnx.slabs import GROUP, SlabSpec

_LEAST_SCALE = np.float32(1e-30)


@dataclass(frozen=True, slots=True)
class Held:
    """Names of what attention sees: the new tokens (T, heads * d) as they are held, and the past (B, heads, P, d)."""

    new: str
    past: str


class QuantizedKV:
    """Records one layer's keys or values. Slabs are (slots, heads, capacity, width). Thread: any.

    A slab comes in twice: `past.NAME` are the step's slots, `flat.NAME` all cells as rows, written in place by giving
    `present.NAME` the same memory.
    """

    def __init__(self, graph: Graph, bits: int, heads: int, dim: int) -> None:
        self._graph = graph
        self._bits = bits
        self._heads = heads
        self._dim = dim

    def append(self, slabs: Sequence[SlabSpec], new: str) -> Held:
        """Quantise and write new tokens (T, heads * d); the slabs are those of codes, scales and offsets."""
        graph, groups = self._graph, self._dim // GROUP
        codes, scales, offsets = self._quantized(new)
        rows = (self._packed(codes), self._shaped(scales, -1, groups), self._shaped(offsets, -1, groups))
        pasts, places = [], f"cells.{self._heads}"
        graph.inputs[places] = TensorType(np.dtype(np.int64), (places, 1))
        begin, axis = (graph.constant(np.array([number], np.int64)) for number in (0, 2))
        for slab, cells in zip(slabs, rows, strict=True):
            past, flat = TensorType(slab.dtype, ("B", slab.heads, "C", slab.width)), ("rows", slab.width)
            graph.inputs[f"past.{slab.name}"] = past
            graph.inputs[f"flat.{slab.name}"] = graph.outputs[f"present.{slab.name}"] = TensorType(slab.dtype, flat)
            pasts.append(graph.add("Slice", [f"past.{slab.name}", begin, "past", axis])[0])
            inputs, outputs = [f"flat.{slab.name}", places, cells], [f"present.{slab.name}"]
            graph.append_node("ScatterND", inputs, outputs, "", {})
        seen = self._shaped(self._dequantized(codes, scales, offsets), -1, self._heads * self._dim)
        return Held(seen, self._unpacked(*pasts))

    def _shaped(self, x: str, *shape: int) -> str:
        return self._graph.add("Reshape", [x, self._graph.constant(np.array(shape, np.int64))])[0]

    def _quantized(self, new: str) -> tuple[str, str, str]:
        """Shapes: (T, heads * d) to codes (G, 32) as floats, scales and offsets (G, 1)."""
        graph = self._graph
        groups, axis = self._shaped(new, -1, GROUP), graph.constant(np.array([1], np.int64))
        (least,), (greatest,) = (graph.add(op, [groups, axis]) for op in ("ReduceMin", "ReduceMax"))
        (span,) = graph.add("Sub", [greatest, least])
        (steps,) = graph.add("Mul", [span, graph.constant(np.float32(1 / (2**self._bits - 1)).reshape(1))])
        (scale,) = graph.add("Max", [steps, graph.constant(_LEAST_SCALE.reshape(1))])
        (above,) = graph.add("Sub", [groups, least])
        (exact,) = graph.add("Div", [above, scale])
        return graph.add("Round", [exact])[0], scale, least

    def _dequantized(self, codes: str, scales: str, offsets: str) -> str:
        (scaled,) = self._graph.add("Mul", [codes, scales])
        return self._graph.add("Add", [scaled, offsets])[0]

    def _packed(self, codes: str) -> str:
        """Shapes: (G, 32) as floats to bytes (T * heads, d * bits / 8)."""
        graph = self._graph
        if self._bits == 4:
            pair = graph.constant(np.array([[1], [16]], np.float32))
            (codes,) = graph.add("MatMul", [self._shaped(codes, -1, 2), pair])
        (octets,) = graph.add("Cast", [codes], to=_UINT8)
        return self._shaped(octets, -1, self._dim * self._bits // 8)

    def _unpacked(self, codes: str, scales: str, offsets: str) -> str:
        """Shapes: (B, heads, P, any) each to (B, heads, P, d)."""
        graph = self._graph
        if self._bits == 4:
            (low,) = graph.add("BitwiseAnd", [codes, graph.constant(np.array([15], np.uint8))])
            (high,) = graph.add("BitShift", [codes, graph.constant(np.array([4], np.uint8))], direction="RIGHT")
            last = graph.constant(np.array([-1], np.int64))
            halves = [graph.add("Unsqueeze", [half, last])[0] for half in (low, high)]
            (codes,) = graph.add("Concat", halves, axis=-1)
        (values,) = graph.add("Cast", [codes], to=_FLOAT)
        parted = self._shaped(values, 0, 0, 0, -1, GROUP) if self._bits == 8 else self._by_group(values)
        last = graph.constant(np.array([-1], np.int64))
        (scale,), (offset,) = (graph.add("Unsqueeze", [each, last]) for each in (scales, offsets))
        return self._shaped(self._dequantized(parted, scale, offset), 0, 0, 0, self._dim)

    def _by_group(self, values: str) -> str:
        """Shapes: (B, heads, P, d / 2, 2) to (B, heads, P, d / 32, 32)."""
        return self._shaped(values, 0, 0, 0, self._dim // GROUP, GROUP)


_FLOAT, _UINT8 = 1, 2
"""ONNX's numbers of these types. Source: onnx.proto, TensorProto.DataType."""
