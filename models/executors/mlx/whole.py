"""The operations on whole texts on MLX, without state: for embeddings and for the text encoders of pictures."""

from collections.abc import Sequence

import mlx.core as mx

from models.executors.mlx.activations import Activations
from models.executors.mlx.ops import Compute
from models.executors.mlx.recurrent import Run
from models.executors.mlx.rotations import Wavelengths, position_factors
from models.executors.mlx.weights import Weights
from models.ops import Attention, Embedding, PositionScale, RopeConfig


class WholeOps(Compute):
    """The operations on whole texts, without state: a layer that looks at an earlier one's computes it again."""

    def __init__(self, weights: Weights, tokens: mx.array, activations: Activations, wavelengths: Wavelengths) -> None:
        super().__init__(weights, tokens, activations, wavelengths)
        self._appended: dict[int, tuple[mx.array, mx.array]] = {}

    def look_again(self, q: mx.array, layer: int, spec: Attention) -> mx.array:
        """See `Ops.look_again`."""
        return self.attention(q, *self._appended[layer], layer, spec)


class TextOps(WholeOps):
    """The operations on one text by itself, without state. Keys from `visible` on are seen by nobody."""

    def __init__(self, weights: Weights, tokens: mx.array, wavelengths: Wavelengths, visible: int | None) -> None:
        super().__init__(weights, tokens, Activations(), wavelengths)
        self._visible = visible

    def _recur(self, parts: Sequence[mx.array], layer: int, shape: tuple[int, ...], run: Run) -> mx.array:  # noqa: ARG002
        """See `Recurrence._recur`."""
        made, _ = run([x[None] for x in parts], mx.zeros((1, *shape), mx.float32))
        return made.reshape(len(parts[0]), -1)

    def rotate(self, x: mx.array, heads: int, rope: RopeConfig) -> mx.array:
        """See `Ops.rotate`."""
        rows = x.reshape(1, len(x), heads, -1).swapaxes(1, 2)
        return self._wavelengths.rotate(rows, rope, 0)[0].swapaxes(0, 1).reshape(x.shape)

    def position_scale(self, x: mx.array, scale: PositionScale) -> mx.array:
        """See `Ops.position_scale`."""
        return x * position_factors(mx.arange(len(x)), scale).astype(x.dtype)

    def embed_positions(self, table: Embedding, first: int = 0) -> mx.array:
        """See `Ops.embed_positions`."""
        return self._weights.table(table).rows(mx.arange(first, first + len(self._tokens)))

    def attention(self, q: mx.array, k: mx.array, v: mx.array, layer: int, spec: Attention) -> mx.array:
        """See `Ops.attention`."""
        self._appended[layer] = (k, v)
        length = len(q)
        queries, keys, values = (
            x.reshape(1, length, heads, -1).swapaxes(1, 2)
            for x, heads in ((q, spec.heads), (k, spec.kv_heads), (v, spec.kv_heads))
        )
        if spec.rope is not None:
            queries, keys = (self._wavelengths.rotate(x, spec.rope, 0) for x in (queries, keys))
        places = mx.arange(length)
        mask = places[None] <= places[:, None]
        if spec.window is not None:
            mask = mask & (places[None] > places[:, None] - spec.window)
        if spec.chunk is not None:
            mask = mask & (places[None] // spec.chunk == places[:, None] // spec.chunk)
        if self._visible is not None:
            mask = mask & (places[None] < self._visible)
        out = self._attended(queries, keys, values, spec, mask)
        return out[0].swapaxes(0, 1).reshape(length, -1)
