"""Sessions: where a run reads and writes."""

import numpy as np

from models.executors.onnx.graph import Graph, TensorType, cut
from models.executors.onnx.sessions import Sessions

FLOAT = np.dtype(np.float32)


def doubling() -> tuple[Sessions, str]:
    """A session that doubles `x`, and the name of what it makes."""
    graph = Graph(inputs={"x": TensorType(FLOAT, ("T",))}, weights={"two": 4})
    (y,) = graph.add("Mul", ["x", "two"])
    graph.outputs[y] = TensorType(FLOAT, ("T",))
    sessions = Sessions(graph, 1)
    for index, part in enumerate(cut(graph, 4)):
        sessions.put(index, part, {"two": np.array([2], FLOAT)})
    return sessions, y


def test_an_array_that_is_filled_anew_is_read_anew():
    sessions, y = doubling()
    x, made = np.ones(3, FLOAT), np.empty(3, FLOAT)
    for value in (1, 5):
        x[:] = value
        sessions.run((0, 0), {}, {"x": x}, {y: made})
        assert made.tolist() == [2 * value] * 3


def test_arrays_of_another_size_or_place_are_bound_anew():
    sessions, y = doubling()
    memory = np.arange(8, dtype=FLOAT)
    for begin, end in ((0, 4), (0, 3), (2, 5), (0, 4)):
        made = np.empty(end - begin, FLOAT)
        sessions.run((0, 0), {}, {"x": memory[begin:end]}, {y: made})
        assert made.tolist() == [2 * value for value in range(begin, end)]


def test_a_place_for_a_result_counts_again_after_a_run_that_had_none():
    sessions, y = doubling()
    x, made = np.ones(3, FLOAT), np.empty(3, FLOAT)
    sessions.run((0, 0), {}, {"x": x}, {y: made})
    made[:] = 0
    sessions.run((0, 0), {}, {"x": x}, {})
    assert made.tolist() == [0, 0, 0]
    sessions.run((0, 0), {}, {"x": x}, {y: made})
    assert made.tolist() == [2, 2, 2]
