"""What ranks say to each other, by `mx.distributed`. Source: mlx v0.32 `mlx.core.distributed`.

Built lazily as everything else. Collectives that do not depend on each other might be run in another order on another
rank, so each waits for the one before it.

A ring's sum of n ranks is 2 (n - 1) hops of an nth of the values, gathering them is n - 1 hops of all of them: what is
small is gathered, and added up by each rank in the same order.
"""

from dataclasses import dataclass

import mlx.core as mx

from models.executors.mlx.ops import StepOps
from models.ops import Embedding, Norm, Ops
from models.sharding.layout import Layout, local_ranges, local_width, ranges

Arrays = Ops[mx.array]

HOP_BYTES = 64 * 1024
"""What a link could carry while a hop waits: 50 us over TCP at 10 Gbit/s."""


@dataclass(slots=True)
class MLXCommunication:
    """Implements `Communication[mx.array]`. Thread: the executor's."""

    group: mx.distributed.Group
    dtype: mx.Dtype
    """What is computed in."""
    last: mx.array | None = None
    """What the last collective made."""
    count: int = 0
    nbytes: int = 0
    """What this rank gave away, over all collectives."""

    def sum(self, ops: Arrays, x: mx.array) -> mx.array:  # noqa: ARG002 - as all of them
        """See `Communication.sum`."""
        return self._summed(x)

    def gather(self, ops: Arrays, x: mx.array, layout: Layout) -> mx.array:  # noqa: ARG002
        """See `Communication.gather`."""
        ranks, tokens = self.group.size(), len(x)
        every = self._said(mx.distributed.all_gather(self._next(x), group=self.group)).reshape(ranks, tokens, -1)
        pieces = []
        for span, start in local_ranges(layout):
            own = every[:: ranks // span.pieces, :, start : start + span.local]
            pieces.append(own.swapaxes(0, 1).reshape(tokens, -1)[:, : span.width])
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)

    def own(self, ops: Arrays, x: mx.array, layout: Layout) -> mx.array:  # noqa: ARG002
        """See `Communication.own`."""
        pieces = [x[:, begin:end] for begin, end in ranges(layout, self.group.rank(), self.group.size())]
        made = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)
        assert made.shape[-1] == local_width(layout)
        return made

    def own_picks(
        self,
        ops: Arrays,  # noqa: ARG002
        picks: mx.array,
        weights: mx.array,
        first: int,
        count: int,
    ) -> tuple[mx.array, mx.array]:
        """See `Communication.own_picks`."""
        local = picks.astype(mx.int32) - first
        here = (local >= 0) & (local < count)
        return mx.where(here, local, 0).astype(picks.dtype), mx.where(here, weights, 0)

    def embed_part(self, ops: Arrays, table: Embedding, first: int, rows: int) -> mx.array:
        """See `Communication.embed_part`. Pictures' rows are added by the rank that has them."""
        assert isinstance(ops, StepOps)
        tokens = mx.where(ops.tokens < rows, ops.tokens, 0) if table.is_partial else ops.tokens
        local = tokens - first
        here = (local >= 0) & (local < table.rows)
        found = ops.weights.table(table).rows(mx.where(here, local, 0))
        return ops.with_pictures(mx.where(here[:, None], found, 0))

    def deepen(self, ops: Arrays, x: mx.array, layers: int) -> mx.array:
        """See `Communication.deepen`."""
        assert isinstance(ops, StepOps)
        return x + self.sum(ops, ops.deepen(mx.zeros_like(x), layers)) if ops.has_pictures else x

    def norm_part(self, ops: Arrays, x: mx.array, norm: Norm, width: int) -> mx.array:
        """See `Communication.norm_part`."""
        assert isinstance(ops, StepOps)
        wide = x.astype(mx.float32)
        squares = self.sum(ops, mx.square(wide).sum(axis=-1, keepdims=True))
        normed = (wide * mx.rsqrt(squares / width + norm.eps)).astype(x.dtype)
        weight = ops.weights.norm(norm)
        return normed if weight is None else normed * weight

    def send(self, ops: Arrays, *values: mx.array, to: int) -> mx.array:  # noqa: ARG002
        """See `Communication.send`. Set off at once: nothing here waits for it."""
        whole = values[0] if len(values) == 1 else mx.concatenate(list(values), axis=-1)
        sent = self._said(mx.distributed.send(self._next(whole), to, group=self.group))
        mx.async_eval(sent)
        return sent

    def receive(self, ops: Arrays, *like: mx.array, widths: tuple[int, ...], source: int) -> tuple[mx.array, ...]:
        """See `Communication.receive`."""
        assert isinstance(ops, StepOps)
        shape = (len(like[0] if like else ops.tokens), sum(widths))
        self.count += 1
        whole = self._said(mx.distributed.recv(shape, self.dtype, source, group=self.group))
        ends = [sum(widths[: number + 1]) for number in range(len(widths) - 1)]
        return tuple(mx.split(whole, ends, axis=-1)) if ends else (whole,)

    def tell(self, tokens: mx.array) -> mx.array:
        """What the first rank drew, for all; the others give zeros. Shapes: int32 (N,) both ways."""
        return self._summed(tokens)

    def begin(self) -> None:
        """A step begins: what was said before it is over."""
        self.last = None

    def _summed(self, x: mx.array) -> mx.array:
        ranks = self.group.size()
        # Half the hops are worth ranks / 2 times the bytes as long as these fit into what is not waited for.
        if x.nbytes * (ranks - 2) > HOP_BYTES * ranks:
            return self._said(mx.distributed.all_sum(self._next(x), group=self.group))
        every = self._said(mx.distributed.all_gather(self._next(x), group=self.group))
        return every.reshape(ranks, *x.shape).sum(axis=0)

    def _next(self, x: mx.array) -> mx.array:
        self.count += 1
        self.nbytes += x.nbytes
        if self.last is None:
            return x
        after: mx.array = mx.depends([x], [self.last])[0]
        return after

    def _said(self, made: mx.array) -> mx.array:
        self.last = made
        return made
