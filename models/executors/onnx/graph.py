"""A graph in the making: nodes in order, and the constants that they read.

A graph is cut into parts of bounded weight, each a session of its own, so that while one is loaded no more than its
weights are held twice. Imports `onnx` when it is asked for bytes, and not before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from onnx import NodeProto, ValueInfoProto

Array = npt.NDArray[Any]
Attribute = int | float | str | list[int]

OPSET, CONTRIB = 21, "com.microsoft"


@dataclass(frozen=True, slots=True)
class TensorType:
    """A value of the graph: element type and shape; a text is a dimension known only when the graph runs."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation; an empty input is an optional one that is left out."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str
    attributes: Mapping[str, Attribute]
    branches: Mapping[str, "Branch"] = field(default_factory=dict)
    """Of a node that runs one of several graphs: these, by the attributes they are."""

    def reads(self) -> Iterator[str]:
        """What it reads, what its branches read from around them included."""
        yield from (name for name in self.inputs if name)
        for branch in self.branches.values():
            made = {name for node in branch.nodes for name in node.outputs}
            yield from (name for node in branch.nodes for name in node.reads() if name not in made)


@dataclass(frozen=True, slots=True)
class Branch:
    """A graph within a node: no inputs, it reads what is around it."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


@dataclass(slots=True)
class Graph:
    """Nodes in the order in which they run. `inputs` come from outside, `outputs` go there."""

    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: dict[str, TensorType] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    """Small ones, part of the graph itself."""
    weights: dict[str, int] = field(default_factory=dict)
    """The bytes of large ones by name, given to a session when it is made."""
    kinds: dict[str, np.dtype[Any]] = field(default_factory=dict)
    """The types of values that are not float32 and may cross from one part to another."""
    padded: bool = False
    """Values are (B, S, width), texts that are padded to one length; else (T, width), tokens behind one another."""
    tied: set[int] = field(default_factory=set)
    """The numbers of nodes that are in the part of the one before."""
    _count: int = 0

    @property
    def axes(self) -> tuple[str, ...]:
        """A value's dimensions before its width."""
        return ("B", "S") if self.padded else ("T",)

    @property
    def lead(self) -> tuple[int, ...]:
        """The same for Reshape, which copies them."""
        return (0,) * len(self.axes)

    def add(
        self, op: str, inputs: Sequence[str], *, outputs: int = 1, domain: str = "", **attributes: Attribute
    ) -> list[str]:
        """Append a node; the names of its outputs."""
        names = [self.name(op) for _ in range(outputs)]
        self.nodes.append(Node(op, tuple(inputs), tuple(names), domain, attributes))
        return names

    def append_node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str,
        attributes: Mapping[str, Attribute],
    ) -> None:
        """Append a node whose outputs are named."""
        self.nodes.append(Node(op, tuple(inputs), tuple(outputs), domain, attributes))

    def branch(self, record: Callable[[], str | tuple[str, ...]]) -> Branch:
        """What `record` appends, by itself; it returns the names of its outputs."""
        around, self.nodes = self.nodes, []
        try:
            outputs = record()
            return Branch(tuple(self.nodes), (outputs,) if isinstance(outputs, str) else outputs)
        finally:
            self.nodes = around

    def choose(self, condition: str, then: Branch, otherwise: Branch, *outputs: str) -> str:
        """Append an `If`; the name of its first output, where `outputs` do not say all."""
        names = outputs or (self.name("If"),)
        assert len(names) == len(then.outputs) == len(otherwise.outputs)
        self.nodes.append(Node("If", (condition,), names, "", {}, {"then_branch": then, "else_branch": otherwise}))
        return names[0]

    @contextmanager
    def in_one_part(self) -> Iterator[None]:
        """What is appended meanwhile stays together, for many values pass between it. Not within a branch."""
        first = len(self.nodes)
        yield
        self.tied |= set(range(first + 1, len(self.nodes)))

    def name(self, kind: str) -> str:
        """A name that no value has."""
        self._count += 1
        return f"{kind}.{self._count}"

    def constant(self, value: Array) -> str:
        """A small constant; the same value is the same constant."""
        key = f"const.{value.dtype}.{value.shape}.{value.tobytes().hex()}"
        self.constants.setdefault(key, value)
        return key


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive nodes of a graph, and the values that come in and go out."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]


def cut(graph: Graph, most_bytes: int) -> list[Part]:
    """Cut a graph into parts whose weights take so many bytes at most, or cannot be parted."""
    groups: list[list[Node]] = [[]]
    held = 0
    for nodes in units(graph):
        nbytes = weights_nbytes(graph, nodes)
        if held and held + nbytes > most_bytes:
            groups.append([])
            held = 0
        groups[-1] += nodes
        held += nbytes
    parts: list[Part] = []
    wanted = set(graph.outputs)
    for group in reversed(groups):
        parts.append(_part(graph, group, wanted))
        wanted |= {name for node in group for name in node.reads()}
    return parts[::-1]


def units(graph: Graph) -> list[list[Node]]:
    """The nodes, those together that are not to be parted."""
    made: list[list[Node]] = []
    for number, node in enumerate(graph.nodes):
        if number in graph.tied:
            made[-1].append(node)
        else:
            made.append([node])
    return made


def weights_nbytes(graph: Graph, nodes: Sequence[Node]) -> int:
    """The bytes of the weights that nodes read."""
    return sum(graph.weights.get(name, 0) for node in nodes for name in node.reads())


def _part(graph: Graph, nodes: list[Node], wanted: AbstractSet[str]) -> Part:
    """A part, of whose values the `wanted` ones go out."""
    made = dict.fromkeys(name for node in nodes for name in node.outputs if name)
    read = dict.fromkeys(name for node in nodes for name in node.reads())
    weights = tuple(name for name in read if name in graph.weights)
    inputs = tuple(name for name in read if not (name in made or name in graph.weights or name in graph.constants))
    return Part(tuple(nodes), inputs, tuple(name for name in made if name in wanted), weights)


def serialized(graph: Graph, part: Part, weights: Mapping[str, Array]) -> bytes:
    """The part as an ONNX model without its weights, which are given to the session by name. Thread: any."""
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - 11 MiB that only loading needs

    read = {name for node in part.nodes for name in node.reads()}
    initializers = [numpy_helper.from_array(value, name) for name, value in graph.constants.items() if name in read]
    for name in part.weights:
        external = TensorProto(name=name, dims=weights[name].shape)
        external.data_type = helper.np_dtype_to_tensor_dtype(weights[name].dtype)
        external.data_location = TensorProto.EXTERNAL
        external.external_data.add(key="location", value="given to the session")
        initializers.append(external)
    nodes = [_node(node) for node in part.nodes]
    body = helper.make_graph(nodes, "part", _infos(graph, part.inputs), _infos(graph, part.outputs), initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    text: bytes = helper.make_model(body, opset_imports=opsets, ir_version=10).SerializeToString()
    return text


def _node(node: Node) -> "NodeProto":
    from onnx import TensorProto, helper  # noqa: PLC0415 - see above

    attributes: dict[str, Any] = dict(node.attributes)
    for name, branch in node.branches.items():
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in branch.outputs]
        attributes[name] = helper.make_graph([_node(inner) for inner in branch.nodes], name, [], outputs)
    return helper.make_node(node.op, node.inputs, node.outputs, domain=node.domain, **attributes)


def _infos(graph: Graph, names: Iterable[str]) -> "list[ValueInfoProto]":
    """Types and shapes of a part's inputs or outputs; those that cross between parts are float32 of any shape."""
    from onnx import TensorProto, helper  # noqa: PLC0415 - see above

    infos = []
    for name in names:
        known = graph.inputs.get(name) or graph.outputs.get(name)
        kind = graph.kinds.get(name) if known is None else known.dtype
        dtype = TensorProto.FLOAT if kind is None else helper.np_dtype_to_tensor_dtype(kind)
        infos.append(helper.make_tensor_value_info(name, dtype, None if known is None else known.shape))
    return infos
