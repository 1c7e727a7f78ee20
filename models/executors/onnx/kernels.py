"""What is to be known of ONNX Runtime's kernels on this processor, found by asking them."""

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from models.executors.onnx.graph import CONTRIB, Array, Graph, TensorType, cut
from models.executors.onnx.sessions import Sessions

ROUNDED, EXACT = 4, 0
"""MatMulNBits' accuracy levels: activations rounded to int8 in blocks, or left alone."""
_ROWS, _INPUTS, _OUTPUTS = 6, 512, 72
_FLOAT = np.dtype(np.float32)

Floats = npt.NDArray[np.float32]


@cache
def treats_rows_alike(bits: int, block: int, level: int) -> bool:
    """Whether a row's product with a quantised matrix is the same to the last bit however many rows there are.

    Kernels take several rows at once, and an odd last one, or one alone, may be summed in another order (onnxruntime
    1.32: with AVX2 one row of 4 bits alone, with AVX512 an odd last one in large blocks). With an even number of rows
    all are alike. Takes a millisecond. Thread: any.
    """
    multiply = quantized_product(bits, block, level, _INPUTS, _OUTPUTS)
    x = np.random.default_rng(1).standard_normal((_ROWS, _INPUTS), np.float32)
    together = multiply(x)
    return all(np.array_equal(multiply(x[:count]), together[:count]) for count in range(1, _ROWS))


def quantized_product(bits: int, block: int, level: int, inputs: int, outputs: int) -> Callable[[Floats], Floats]:
    """MatMulNBits with some matrix. Shapes: (T, inputs) to (T, outputs). Thread: any.

    Raises:
        ExecutionError: ONNX Runtime has no such product.
    """
    draw = np.random.default_rng(0)
    weights: dict[str, Array] = {
        "codes": draw.integers(0, 256, (outputs, inputs // block, block * bits // 8), np.uint8),
        "scales": draw.standard_normal((outputs, inputs // block), np.float32),
    }
    graph = Graph({"x": TensorType(_FLOAT, ("T", inputs))}, weights={name: one.nbytes for name, one in weights.items()})
    (y,) = graph.add(
        "MatMulNBits",
        ["x", *weights],
        domain=CONTRIB,
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    graph.outputs[y] = TensorType(_FLOAT, ("T", outputs))
    (part,) = cut(graph, sum(graph.weights.values()))
    sessions = Sessions(graph, 1)
    sessions.put(0, part, weights)

    def multiply(x: Floats) -> Floats:
        made = np.empty((len(x), outputs), np.float32)
        sessions.run((0, 0), {}, {"x": x}, {y: made})
        return made

    return multiply
