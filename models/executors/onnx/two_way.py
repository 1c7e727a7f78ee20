"""Tokens of a picture that look at each other both ways: beside the attention kernel, which looks back alone.

A step that holds such a run is of one row. Its layers that look both ways compute scores and softmax by plain products,
in a branch that no other step takes; keys and values are written by the kernel as ever. Source: Gemma 3 (arXiv
2503.19786).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from models.executors.base import Row
from models.executors.onnx.graph import CONTRIB, Branch, Graph, TensorType
from models.ops import Attention

Layout: TypeAlias = Literal["slab", "window", "past"]
"""Which keys are looked at: a slab's with the step's own in it, a moving window's and the step's behind them, or all
earlier ones and the step's behind them."""
Mask: TypeAlias = tuple[Layout, int | None]
"""The layout, and the layer's window."""

FLOAT, INT64, BOOL = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.bool_)
HAPPENS, END = "two_way", "two_way.end"
"""Whether the step has such a run, and how many tokens its row has behind it."""
_INT32 = 6
"""ONNX's number of the type."""


class TwoWayNodes:
    """Records the branch. Thread: any."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.masks: set[Mask] = set()
        """What the steps have to give: see `arrays`."""

    def chosen(self, look: Callable[[], str], plain: str) -> str:
        """What `look` records where the step has a run, else `plain`. Shapes: (T, H * d) both, and returned."""
        graph = self._graph
        return graph.choose(self._happens(), graph.branch(look), self._passed(plain))

    def looked_first(self, look: Callable[[], str], width: int, last: str) -> tuple[str, str]:
        """What `look` records where the step has a run, else nothing; and `last`, which waits for it.

        The kernel moves a window in place and must not before its past was looked at: adding zero to what it reads
        says so.
        """
        graph = self._graph
        nothing = graph.constant(np.zeros((0, width), FLOAT))
        looked = graph.choose(self._happens(), graph.branch(look), self._passed(nothing))
        (tokens,) = graph.add("Shape", [looked], start=0, end=1)
        (zero,) = graph.add("Mul", [tokens, graph.constant(np.zeros(1, INT64))])
        (narrow,) = graph.add("Cast", [zero], to=_INT32)
        return looked, graph.add("Add", [last, narrow])[0]

    def passed(self, value: str) -> str:
        """The value under another name, as a branch wants it."""
        return self._graph.add("Identity", [value])[0]

    def window(self, slab: str, window: int, new: str) -> str:
        """What a moving window holds, and the step's own. Shapes: (1, K, C, d), (1, K, S, d); (1, K, L, d)."""
        return self._graph.add("Concat", [self._beginning(slab, held_input(window)), new], axis=2)[0]

    def present(self, slab: str) -> str:
        """A slab's keys or values up to the step's last. Shapes: (1, K, C, d); (1, K, L, d)."""
        return self._beginning(slab, END)

    def looked(self, qkv: tuple[str, str, str], spec: Attention, width: int, layout: Layout) -> str:
        """Attention by its definition. Shapes: q (1, S, H * width), k and v (1, K, L, width); returns as q."""
        graph, shared = self._graph, spec.heads // spec.kv_heads
        (parts,) = graph.add("Reshape", [qkv[0], self._shape(-1, spec.kv_heads, shared, width)])
        (turned,) = graph.add("Transpose", [parts], perm=[1, 2, 0, 3])
        q, k, v = (
            graph.add("Reshape", [x, self._shape(spec.kv_heads, -1, width)])[0] for x in (turned, qkv[1], qkv[2])
        )
        (scores,) = graph.add("FusedMatMul", [q, k], domain=CONTRIB, transB=1, alpha=float(spec.scale))
        if spec.softcap is not None:
            (small,) = graph.add("Mul", [scores, graph.constant(np.array(1 / spec.softcap, FLOAT))])
            (bent,) = graph.add("Tanh", [small])
            (scores,) = graph.add("Mul", [bent, graph.constant(np.array(spec.softcap, FLOAT))])
        # A head's queries lie behind the other heads' that share its keys.
        (masks,) = graph.add("Concat", [self._mask((layout, spec.window))] * shared, axis=0)
        (masked,) = graph.add("Add", [scores, masks])
        (weights,) = graph.add("Softmax", [masked], axis=-1)
        (made,) = graph.add("MatMul", [weights, v])
        (heads,) = graph.add("Reshape", [made, self._shape(spec.kv_heads, shared, -1, width)])
        (back,) = graph.add("Transpose", [heads], perm=[2, 0, 1, 3])
        return graph.add("Reshape", [back, self._shape(1, -1, spec.heads * width)])[0]

    def _beginning(self, slab: str, end: str) -> str:
        graph = self._graph
        graph.inputs[end] = TensorType(INT64, (1,))
        begin, axis = self._shape(0), self._shape(2)
        return graph.add("Slice", [slab, begin, end, axis])[0]

    def _mask(self, mask: Mask) -> str:
        self.masks.add(mask)
        name = mask_input(mask)
        self._graph.inputs[name] = TensorType(FLOAT, (f"{name}.S", f"{name}.L"))
        return name

    def _happens(self) -> str:
        self._graph.inputs[HAPPENS] = TensorType(BOOL, ())
        return HAPPENS

    def _passed(self, value: str) -> Branch:
        return self._graph.branch(lambda: self.passed(value))

    def _shape(self, *numbers: int) -> str:
        return self._graph.constant(np.array(numbers, np.int64))


def mask_input(mask: Mask) -> str:
    """The input that is added to the scores of layers with this layout and window."""
    layout, window = mask
    return f"seen.{layout}.{window or 'all'}"


def held_input(window: int) -> str:
    """The input that says how many earlier tokens a moving window holds."""
    return f"two_way.held.{window}"


def arrays(row: Row | None, masks: Iterable[Mask], held: Callable[[int, int], int]) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a step: of the row that has such runs, or none.

    Args:
        row: the only row of the step.
        masks: see `TwoWayNodes.masks`.
        held: how many of so many tokens a moving window of that many holds: window, tokens.
    """
    made: dict[str, npt.NDArray[Any]] = {HAPPENS: np.array(row is not None)}
    made[END] = np.array([0 if row is None else row.begin + row.length], INT64)
    for mask in masks:
        layout, window = mask
        if layout == "window":
            assert window is not None
            made[held_input(window)] = np.array([0 if row is None else held(window, row.begin)], INT64)
        nothing = np.zeros((1, 1), np.float32)
        made[mask_input(mask)] = nothing if row is None else _mask(row, mask, held)
    return made


def _mask(row: Row, mask: Mask, held: Callable[[int, int], int]) -> npt.NDArray[np.float32]:
    """What is added to the scores: 0 where a token looks, else -inf. Shapes: (S, L)."""
    layout, window = mask
    own = np.arange(row.begin, row.begin + row.length)
    first = 0
    if layout == "window":
        assert window is not None
        first = row.begin - held(window, row.begin)
    earlier = np.arange(first, row.begin)
    if layout == "past" and not row.begin:
        # There is always one, whatever it holds.
        earlier = np.array([np.iinfo(np.int64).max])
    keys = np.concatenate([earlier, own])[None]
    looks = keys <= own[:, None]
    for begin, end in row.runs:
        looks[begin:end] |= (keys >= row.begin + begin) & (keys < row.begin + end)
    if window is not None:
        looks &= keys > own[:, None] - window
    return np.where(looks, np.float32(0), np.float32(-np.inf))
