"""Whole texts to hidden states on MLX: all texts of a pass at once, padded to one length, without state."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from models.arch import Model
from models.checkpoint import Checkpoint
from models.errors import ExecutionError
from models.executors.base import Embedder
from models.executors.mlx.activations import Activations
from models.executors.mlx.loading import compute_dtype, load_weights
from models.executors.mlx.recurrent import Run
from models.executors.mlx.rotations import Wavelengths, position_factors
from models.executors.mlx.weights import Policy, Weights
from models.executors.mlx.whole import WholeOps
from models.mlx_memory import configure, give_back
from models.ops import Attention, Embedding, PositionScale, RelativeBias, RopeConfig

Floats = npt.NDArray[np.float32]

_PADDING = 8


class PassOps(WholeOps):
    """The operations on a pass of texts, padding behind each. Flat values are (B * S, …). Thread: the executor's."""

    def __init__(self, weights: Weights, texts: Sequence[Sequence[int]], length: int, wavelengths: Wavelengths) -> None:
        ids = np.zeros((len(texts), length), np.int32)
        visible = np.zeros((len(texts), length), np.bool_)
        for place, text in enumerate(texts):
            ids[place, : len(text)] = text
            visible[place, : len(text)] = True
        super().__init__(weights, mx.array(ids.reshape(-1)), Activations(), wavelengths)
        self._count, self._length = len(texts), length
        self._visible = None if visible.all() else mx.array(visible)[:, None, None, :]
        self._masks: dict[tuple[int | None, int | None, bool], mx.array | None] = {}
        self._biases: dict[RelativeBias, mx.array] = {}

    def embed_positions(self, table: Embedding, first: int = 0) -> mx.array:
        """See `Ops.embed_positions`."""
        rows = self._weights.table(table).rows(mx.arange(first, first + self._length))
        return mx.tile(rows, (self._count, 1))

    def _recur(self, parts: Sequence[mx.array], layer: int, shape: tuple[int, ...], run: Run) -> mx.array:  # noqa: ARG002
        """See `Recurrence._recur`."""
        rows = [x.reshape(self._count, self._length, -1) for x in parts]
        made, _ = run(rows, mx.zeros((self._count, *shape), mx.float32))
        return made.reshape(len(parts[0]), -1)

    def rotate(self, x: mx.array, heads: int, rope: RopeConfig) -> mx.array:
        """See `Ops.rotate`."""
        rows = x.reshape(self._count, self._length, heads, -1).swapaxes(1, 2)
        return self._wavelengths.rotate(rows, rope, 0).swapaxes(1, 2).reshape(x.shape)

    def position_scale(self, x: mx.array, scale: PositionScale) -> mx.array:
        """See `Ops.position_scale`."""
        return x * mx.tile(position_factors(mx.arange(self._length), scale), (self._count, 1)).astype(x.dtype)

    def attention(self, q: mx.array, k: mx.array, v: mx.array, layer: int, spec: Attention) -> mx.array:
        """See `Ops.attention`."""
        self._appended[layer] = (k, v)
        queries, keys, values = (
            x.reshape(self._count, self._length, heads, -1).swapaxes(1, 2)
            for x, heads in ((q, spec.heads), (k, spec.kv_heads), (v, spec.kv_heads))
        )
        if spec.rope is not None:
            queries, keys = (self._wavelengths.rotate(x, spec.rope, 0) for x in (queries, keys))
        out = self._attended(queries, keys, values, spec, self._mask(spec))
        return out.swapaxes(1, 2).reshape(len(q), -1)

    def _mask(self, spec: Attention) -> mx.array | None:
        """What is seen, or what is added to the scores. Shapes: (B or 1, H or 1, S, S); None: all is seen."""
        key = (spec.window, spec.chunk, spec.bidirectional)
        if key not in self._masks:
            self._masks[key] = self._seen(spec)
        seen = self._masks[key]
        if spec.relative is None:
            return seen
        if spec.relative not in self._biases:
            rows = self._weights.table(spec.relative.table).rows(mx.array(spec.relative.buckets(self._length)))
            self._biases[spec.relative] = rows.transpose(2, 0, 1)[None]
        bias = self._biases[spec.relative]
        return bias if seen is None else mx.where(seen, bias, mx.array(-mx.inf, bias.dtype))

    def _seen(self, spec: Attention) -> mx.array | None:
        places = mx.arange(self._length)
        distance = places[:, None] - places[None]
        seen = self._visible
        limits = [] if spec.bidirectional else [distance >= 0]
        if spec.window is not None:
            limits.append(mx.abs(distance) < spec.window)
        if spec.chunk is not None:
            limits.append(places[:, None] // spec.chunk == places[None] // spec.chunk)
        for limit in limits:
            seen = limit[None, None] if seen is None else seen & limit
        return seen


class MLXEmbedder:
    """Implements `Embedder`. Thread: the executor's."""

    def __init__(self, model: Model, weights: Weights) -> None:
        self._model = model
        self._weights = weights
        self._wavelengths = Wavelengths()

    def padded(self, length: int) -> int:
        """See `Embedder.padded`. Thread: any."""
        return -(-length // _PADDING) * _PADDING

    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Floats]:
        """See `Embedder.hidden`."""
        length = max(self.padded(len(text)) for text in texts)
        try:
            made = self._model.forward(PassOps(self._weights, texts, length, self._wavelengths)).astype(mx.float32)
            mx.eval(made)
        except RuntimeError as error:
            raise ExecutionError(f"MLX could not run a pass: {error}") from error
        rows = np.array(made).reshape(len(texts), length, -1)
        return [row[: len(text)] for row, text in zip(rows, texts, strict=True)]

    def memory_bytes(self) -> int:
        """See `Embedder.memory_bytes`."""
        return self._weights.nbytes

    def give_back(self) -> None:
        """See `Embedder.give_back`."""
        give_back()

    def close(self) -> None:
        """See `Embedder.close`."""
        mx.synchronize()
        self._weights = Weights()
        mx.clear_cache()


def load_embedder(
    checkpoint: Checkpoint,
    model: Model,
    *,
    policy: Policy = "keep",
    dtype: mx.Dtype | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Embedder:
    """Load a model for its hidden states. Thread: the executor's. Raises as `models.executors.mlx.load` does."""
    configure()
    dtype = dtype or compute_dtype(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    return MLXEmbedder(model, load_weights(checkpoint, model, policy, dtype, progress=progress))
