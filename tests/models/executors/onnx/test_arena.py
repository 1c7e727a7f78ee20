"""The arena that a tower's sessions share."""

import numpy as np
import psutil

from models.executors.onnx.graph import Graph, TensorType, cut
from models.executors.onnx.sessions import Sessions

FLOAT = np.dtype(np.float32)
VALUES = 16 << 20
MIB = 1 << 20


def negations() -> Sessions:
    """Two sessions, one behind the other, each of a value as large as its input."""
    graph = Graph(inputs={"x": TensorType(FLOAT, ("T",))}, weights={"a": 4, "b": 4})
    (half,) = graph.add("Mul", ["x", "a"])
    (whole,) = graph.add("Mul", [half, "b"])
    graph.outputs[whole] = TensorType(FLOAT, ("T",))
    sessions = Sessions(graph, 1, gives_back=True)
    for index, part in enumerate(cut(graph, 4)):
        sessions.put(index, part, {name: np.array([-1], FLOAT) for name in part.weights})
    return sessions


def finished(sessions: Sessions, x: np.ndarray) -> np.ndarray:
    """What a run makes."""
    parts = sessions.parts((0, 0), {}, {"x": x}, {})
    while True:
        try:
            next(parts)
        except StopIteration as end:
            (made,) = end.value.values()
            return made


def test_a_run_gives_its_memory_back_and_what_it_made_stays():
    sessions, x = negations(), np.arange(VALUES, dtype=np.float32)
    finished(sessions, x[:10])
    before = psutil.Process().memory_info().rss
    made = finished(sessions, x)
    held = psutil.Process().memory_info().rss - before - made.nbytes
    assert held < 16 * MIB
    assert made.flags.owndata, "what is returned lies outside of the arena"
    assert np.array_equal(made, x)


def test_a_run_that_is_given_up_gives_its_memory_back():
    sessions, x = negations(), np.ones(VALUES, np.float32)
    finished(sessions, x[:10])
    before = psutil.Process().memory_info().rss
    parts = sessions.parts((0, 0), {}, {"x": x}, {})
    next(parts)
    assert psutil.Process().memory_info().rss - before > 48 * MIB
    parts.close()
    assert psutil.Process().memory_info().rss - before < 16 * MIB


def test_what_was_made_is_not_written_over_by_the_next_run():
    sessions = negations()
    first = finished(sessions, np.ones(VALUES, np.float32))
    finished(sessions, np.zeros(VALUES, np.float32))
    assert first.min() == 1
