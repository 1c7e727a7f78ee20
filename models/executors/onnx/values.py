"""The values of a recorded forward pass: lazy, so that what the kernels do in one is recorded as one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.executors.onnx.graph import Graph
from models.ops import Embedding, Linear


class Value:
    """A value (T, width), or (B, S, width) of padded texts, recorded when its name is asked for."""

    def __init__(self, width: int, record: Callable[[], str]) -> None:
        self.width = width
        self._record = record
        self._name = ""

    @property
    def name(self) -> str:
        """Its name in the graph."""
        if not self._name:
            self._name = self._record()
        return self._name


class Sum(Value):
    """x + y, which a norm behind it takes over."""

    def __init__(self, graph: Graph, x: Value, y: Value) -> None:
        super().__init__(x.width, lambda: graph.add("Add", [x.name, y.name])[0])
        self.x, self.y = x, y

    @property
    def is_recorded(self) -> bool:
        """It has a name, so there is nothing left to fuse."""
        return bool(self._name)

    def take(self, name: str) -> None:
        """It was computed together with something else."""
        self._name = name


class Biased(Value):
    """A product and its bias, which what comes next may add itself."""

    def __init__(self, graph: Graph, width: int, bias: str, record: Callable[[], str]) -> None:
        super().__init__(width, lambda: graph.add("Add", [self.plain.name, bias])[0])
        self.plain = Value(width, record)
        self.bias = bias


class Projection(Value):
    """The product of one input with several matrices side by side, or with one that is to be split."""

    def __init__(
        self,
        parts: Sequence[Value],
        record: Callable[[], str],
        product: tuple[Value, Sequence[Linear]] | None = None,
    ) -> None:
        """Values that `record` records side by side: if they are its products, of which value with which matrices."""
        super().__init__(sum(part.width for part in parts), record)
        self.parts = tuple(Slice(self, part) for part in parts)
        self.product = product


class Slice(Value):
    """What one of the matrices gives: a product of its own, unless all are wanted as they are."""

    def __init__(self, whole: Projection, own: Value) -> None:
        super().__init__(own.width, lambda: own.name)
        self.whole = whole
        self.own = own


@dataclass(frozen=True, slots=True)
class Lookup:
    """An input of the graph that is looked up on the host: in which table, by the token or by something else."""

    table: Embedding
    first: int | None = None
    """The row of the first position; None: the row is the token's."""
    by_position: bool = True
    """Else all tokens have the first row."""

    def rows_of(self, ids: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of tokens at these places of their texts. Shapes: (T,) all."""
        if self.first is not None:
            return places + self.first if self.by_position else np.full_like(ids, self.first)
        return np.where(ids < self.table.rows, ids, 0) if self.table.is_partial else ids


def named(width: int, name: str) -> Value:
    """A value that is recorded already."""
    return Value(width, lambda: name)
