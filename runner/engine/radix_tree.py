"""RadixTree: values stored under token sequences, shared where the sequences begin alike.

Owns the tree, the bytes it holds and the order of eviction; refuses to know what a value is beyond its size and how to
divide it. Every edge carries one or more tokens and the value for exactly those tokens. A place may have a checkpoint
besides, which cannot be divided: where a tree needs them, a sequence can be taken up at such places alone.
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


class Sized(Protocol):
    """What is kept at a place."""

    @property
    def nbytes(self) -> int:
        """What it takes."""
        ...


Value = TypeVar("Value", bound=Divisible)
Kept = TypeVar("Kept", bound=Sized)


@dataclass(eq=False, slots=True)
class _Node(Generic[Value, Kept]):
    """An edge and the place it leads to. The root alone has no value."""

    tokens: tuple[int, ...]
    value: Value | None
    parent: "_Node[Value, Kept] | None"
    children: "dict[int, _Node[Value, Kept]]" = field(default_factory=dict)
    used: int = 0
    """When it was last of use, by the tree's own clock."""
    checkpoint: Kept | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held here."""
        parts = (self.value, self.checkpoint)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def is_between(self) -> bool:
        """It has a checkpoint in the middle of a branch, with others before and behind it."""
        return self.checkpoint is not None and len(self.children) == 1 and self.spares is not None

    @property
    def spares(self) -> int | None:
        """Tokens that would have to be run again from the checkpoint before, were there none here; None: none is."""
        count, above = len(self.tokens), self.parent
        while above is not None and above.checkpoint is None:
            count, above = count + len(above.tokens), above.parent
        return None if above is None else count


class RadixTree(Generic[Value, Kept]):
    """A cache of values by token prefix, at most `limit_bytes` large. Not thread-safe."""

    def __init__(self, limit_bytes: int, *, needs_checkpoints: bool = False) -> None:
        """`needs_checkpoints`: what ends at none is of no use by itself."""
        self._limit_bytes = limit_bytes
        self._needs_checkpoints = needs_checkpoints
        self._root: _Node[Value, Kept] = _Node((), None, None)
        self._clock = 0
        self.nbytes = 0

    def match(self, tokens: Sequence[int]) -> tuple[int, list[Value], Kept | None]:
        """The longest prefix of `tokens` that is of use: its length, the values that cover it, and its checkpoint."""
        self.touch(tokens)
        path = self._resumable(tokens)
        values = [
            node.value if common == len(node.tokens) else node.value.part(0, common)
            for node, common in path
            if node.value is not None
        ]
        return sum(common for _, common in path), values, path[-1][0].checkpoint if path else None

    def resumable(self, tokens: Sequence[int]) -> int:
        """The length of the longest prefix that is of use."""
        return sum(common for _, common in self._resumable(tokens))

    def touch(self, tokens: Sequence[int]) -> None:
        """Count what is stored of `tokens` as used just now."""
        self._clock += 1
        for node, _ in self._walk(tokens):
            node.used = self._clock

    def depth(self, tokens: Sequence[int]) -> int:
        """How many tokens of `tokens` are stored."""
        return sum(common for _, common in self._walk(tokens))

    def insert(self, tokens: Sequence[int], begin: int, value: Value, checkpoint: Kept | None = None) -> None:
        """Store `value` for `tokens[begin:]`, and a checkpoint behind them.

        `tokens[:begin]` must be stored, no more of `tokens` may be. What was of use longest ago is evicted as far as
        the limit asks; what is larger than the limit is not stored.
        """
        if begin >= len(tokens):
            return
        leaf = _Node(tuple(tokens[begin:]), value, None, checkpoint=checkpoint)
        if leaf.nbytes > self._limit_bytes:
            return
        leaf.parent = self._place(tokens)
        leaf.parent.children[leaf.tokens[0]] = leaf
        leaf.used = self._clock
        self.nbytes += leaf.nbytes
        self._keep_to_limit()

    def mark(self, tokens: Sequence[int], checkpoint: Kept) -> None:
        """Keep a checkpoint behind `tokens`, all of which are stored, if there is none."""
        place = self._place(tokens)
        if place.checkpoint is None:
            place.checkpoint = checkpoint
            self.nbytes += checkpoint.nbytes
            self._keep_to_limit()

    def shrink(self, limit_bytes: int, *, keep: int | None = None) -> None:
        """Evict until no more than `limit_bytes` are held, sparing what was of use at the time `keep`.

        Of a branch that was of use longest ago those checkpoints go first that spare the fewest tokens and have
        another before and behind them, then its end.
        """
        while self.nbytes > limit_bytes:
            orders = [
                (node.used, not node.children, node.spares or 0, node)
                for node in self._nodes()
                if node.used != keep and (not node.children or node.is_between)
            ]
            if not orders:
                return
            *_, node = min(orders, key=lambda order: order[:3])
            if node.children:
                assert node.checkpoint is not None
                self.nbytes -= node.checkpoint.nbytes
                node.checkpoint = None
            else:
                self._evict(node)

    def __len__(self) -> int:
        return sum(1 for _ in self._nodes())

    def _resumable(self, tokens: Sequence[int]) -> list[tuple[_Node[Value, Kept], int]]:
        """The nodes along the longest prefix that is of use, with how many of their tokens it has."""
        path = [(node, common) for node, common in self._walk(tokens) if common]
        if self._needs_checkpoints:
            while path and (path[-1][1] < len(path[-1][0].tokens) or path[-1][0].checkpoint is None):
                path.pop()
        return path

    def _place(self, tokens: Sequence[int]) -> _Node[Value, Kept]:
        """The place behind what is stored of `tokens`, an edge divided if need be; all on the way is used now."""
        self._clock += 1
        at = self._root
        for node, common in list(self._walk(tokens)):
            node.used = self._clock
            at = node if common == len(node.tokens) else self._split(node, common)
        return at

    def _keep_to_limit(self) -> None:
        self.shrink(self._limit_bytes, keep=self._clock)
        # A row that outgrows the limit by itself keeps its beginning.
        self.shrink(self._limit_bytes)

    def _walk(self, tokens: Sequence[int]) -> Iterator[tuple[_Node[Value, Kept], int]]:
        """The nodes along `tokens` with how many of their tokens agree; only the last may agree in part."""
        node, depth = self._root, 0
        while (child := node.children.get(tokens[depth]) if depth < len(tokens) else None) is not None:
            common = _common(child.tokens, tokens, depth)
            yield child, common
            if common < len(child.tokens):
                return
            node, depth = child, depth + common

    def _split(self, node: _Node[Value, Kept], at: int) -> _Node[Value, Kept]:
        """Divide an edge; the upper half, which keeps the node's place. A checkpoint stays behind the lower one."""
        assert node.parent is not None
        assert node.value is not None
        self.nbytes -= node.value.nbytes
        upper: _Node[Value, Kept] = _Node(node.tokens[:at], node.value.part(0, at), node.parent, used=node.used)
        node.parent.children[upper.tokens[0]] = upper
        node.value = node.value.part(at, len(node.tokens))
        node.tokens = node.tokens[at:]
        node.parent = upper
        upper.children[node.tokens[0]] = node
        assert upper.value is not None
        self.nbytes += upper.value.nbytes + node.value.nbytes
        return upper

    def _evict(self, leaf: _Node[Value, Kept]) -> None:
        """Let go of a leaf, and of what led to it alone and is of no use by itself."""
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.tokens[0]]
        self.nbytes -= leaf.nbytes
        if self._needs_checkpoints and parent.parent is not None and not parent.children and parent.checkpoint is None:
            self._evict(parent)

    def _nodes(self) -> Iterator[_Node[Value, Kept]]:
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
