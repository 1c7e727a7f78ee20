"""RadixTree: values stored under token sequences, shared where the sequences begin alike.

Owns the tree, the bytes it holds and the order of eviction; refuses to know what a value is beyond its size and how to
divide it. Every edge carries one or more tokens and the value for exactly those tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar


class Divisible(Protocol):
    """A value for consecutive tokens."""

    @property
    def nbytes(self) -> int:
        """What it takes."""
        ...

    def part(self, begin: int, end: int) -> Self:
        """The value for its tokens [begin, end) alone."""
        ...


Value = TypeVar("Value", bound=Divisible)


@dataclass(eq=False, slots=True)
class _Node(Generic[Value]):
    """An edge and the place it leads to. The root alone has no value."""

    tokens: tuple[int, ...]
    value: Value | None
    parent: "_Node[Value] | None"
    children: "dict[int, _Node[Value]]" = field(default_factory=dict)
    used: int = 0
    """When it was last of use, by the tree's own clock."""


class RadixTree(Generic[Value]):
    """A cache of values by token prefix, at most `limit_bytes` large. Not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._root: _Node[Value] = _Node((), None, None)
        self._clock = 0
        self.nbytes = 0

    def match(self, tokens: Sequence[int]) -> tuple[int, list[Value]]:
        """The longest stored prefix of `tokens`: its length, and the values that cover it in order."""
        self._clock += 1
        values, depth = [], 0
        for node, common in self._walk(tokens):
            node.used = self._clock
            if node.value is not None and common:
                values.append(node.value if common == len(node.tokens) else node.value.part(0, common))
                depth += common
        return depth, values

    def touch(self, tokens: Sequence[int]) -> None:
        """Count what is stored of `tokens` as used just now."""
        self._clock += 1
        for node, _ in self._walk(tokens):
            node.used = self._clock

    def depth(self, tokens: Sequence[int]) -> int:
        """How many tokens of `tokens` are stored."""
        return sum(common for _, common in self._walk(tokens))

    def insert(self, tokens: Sequence[int], begin: int, value: Value) -> None:
        """Store `value` for `tokens[begin:]`; `tokens[:begin]` must be stored, no more of `tokens` may be.

        What was of use longest ago is evicted as far as the limit asks; a value larger than the limit is not stored.
        """
        if value.nbytes > self._limit_bytes or begin >= len(tokens):
            return
        self._clock += 1
        at = self._root
        for node, common in list(self._walk(tokens)):
            node.used = self._clock
            at = node if common == len(node.tokens) else self._split(node, common)
        leaf = _Node(tuple(tokens[begin:]), value, at, used=self._clock)
        at.children[leaf.tokens[0]] = leaf
        self.nbytes += value.nbytes
        self.shrink(self._limit_bytes, keep=self._clock)
        # A row that outgrows the limit by itself keeps its beginning.
        self.shrink(self._limit_bytes)

    def shrink(self, limit_bytes: int, *, keep: int | None = None) -> None:
        """Evict until no more than `limit_bytes` are held, sparing what was of use at the time `keep`."""
        while self.nbytes > limit_bytes:
            leaves = [node for node in self._nodes() if not node.children and node.used != keep]
            if not leaves:
                return
            self._evict(min(leaves, key=lambda node: node.used))

    def __len__(self) -> int:
        return sum(1 for _ in self._nodes())

    def _walk(self, tokens: Sequence[int]) -> Iterator[tuple[_Node[Value], int]]:
        """The nodes along `tokens` with how many of their tokens agree; only the last may agree in part."""
        node, depth = self._root, 0
        while (child := node.children.get(tokens[depth]) if depth < len(tokens) else None) is not None:
            common = _common(child.tokens, tokens, depth)
            yield child, common
            if common < len(child.tokens):
                return
            node, depth = child, depth + common

    def _split(self, node: _Node[Value], at: int) -> _Node[Value]:
        """Divide an edge; the upper half, which keeps the node's place."""
        assert node.parent is not None
        assert node.value is not None
        self.nbytes -= node.value.nbytes
        upper = _Node(node.tokens[:at], node.value.part(0, at), node.parent, used=node.used)
        node.parent.children[upper.tokens[0]] = upper
        node.value = node.value.part(at, len(node.tokens))
        node.tokens = node.tokens[at:]
        node.parent = upper
        upper.children[node.tokens[0]] = node
        assert upper.value is not None
        self.nbytes += upper.value.nbytes + node.value.nbytes
        return upper

    def _evict(self, leaf: _Node[Value]) -> None:
        assert leaf.parent is not None
        assert leaf.value is not None
        del leaf.parent.children[leaf.tokens[0]]
        self.nbytes -= leaf.value.nbytes

    def _nodes(self) -> Iterator[_Node[Value]]:
        """All nodes but the root."""
        unseen = list(self._root.children.values())
        while unseen:
            node = unseen.pop()
            yield node
            unseen.extend(node.children.values())


def _common(edge: tuple[int, ...], tokens: Sequence[int], begin: int) -> int:
    """How many tokens of `edge` stand at `tokens[begin:]`."""
    ahead = tuple(tokens[begin : begin + len(edge)])
    if ahead == edge:
        return len(edge)
    return next((index for index, (a, b) in enumerate(zip(edge, ahead, strict=False)) if a != b), len(ahead))
