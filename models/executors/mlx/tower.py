"""A vision tower on MLX: a pass's graph built lazily, computed piece by piece."""

from collections.abc import Callable, Generator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from models.config_reader import JSON
from models.errors import ExecutionError
from models.executors.base import EncodedPicture, HostArray
from models.executors.footprint import Footprint
from models.executors.groups import Groups, grouped
from models.executors.mlx.loading import Declared, compute_dtype, filled, held_nbytes
from models.executors.mlx.rotations import Wavelengths
from models.executors.mlx.weights import Policy, Weights
from models.executors.mlx.whole import TextOps
from models.mlx_memory import configure
from models.ops import Attention, Embedding, Vector, weights_in
from models.sources.base import Checkpoint, TensorInfo
from models.vision.base import Tower
from models.weights.matching import tower_tensors_of

MOST_SCORES = 32 << 20
"""Scores that attention holds at once: of a whole picture they would be more than all else."""


class PatchOps(TextOps):
    """Implements `TowerOps[mx.array]` for one pass. Thread: the executor's."""

    def __init__(self, weights: Weights, given: Mapping[str, HostArray], dtype: mx.Dtype) -> None:
        """A pass that is given these."""
        super().__init__(weights, mx.zeros(0, mx.int32), Wavelengths(), None)
        self._given = given
        self._dtype = dtype
        self._turns: dict[str, tuple[mx.array, mx.array]] = {}
        self._groups: dict[str, Groups] = {}
        self.pieces: list[mx.array] = []
        """What each attention gives, in order: to be computed one by one."""

    def given(self, name: str, width: int) -> mx.array:  # noqa: ARG002 - known by what is there
        """See `TowerOps.given`."""
        return mx.array(np.ascontiguousarray(self._given[name], np.float32)).astype(self._dtype)

    def look_up(self, table: Embedding, name: str) -> mx.array:
        """See `TowerOps.look_up`."""
        return self._weights.table(table).rows(self._places(name))

    def take(self, x: mx.array, name: str) -> mx.array:
        """See `TowerOps.take`."""
        return x[self._places(name)]

    def turn(self, x: mx.array, heads: int, name: str, *, interleaved: bool = False) -> mx.array:
        """See `TowerOps.turn`."""
        if name not in self._turns:
            angles = np.asarray(self._given[name], np.float32)[:, None]
            self._turns[name] = (mx.array(np.cos(angles)), mx.array(np.sin(angles)))
        cos, sin = self._turns[name]
        rows = x.reshape(len(x), heads, -1).astype(mx.float32)
        if interleaved:
            first, second = rows[..., 0::2], rows[..., 1::2]
            made = mx.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        else:
            first, second = mx.split(rows, 2, axis=-1)
            made = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return made.reshape(x.shape).astype(x.dtype)

    def look_around(self, q: mx.array, k: mx.array, v: mx.array, spec: Attention, groups: str = "") -> mx.array:
        """See `TowerOps.look_around`."""
        heads = (spec.heads, spec.kv_heads, spec.kv_heads)
        if not groups:
            parts = [x.reshape(1, len(x), n, -1).swapaxes(1, 2) for x, n in zip((q, k, v), heads, strict=True)]
            made = self._in_pieces(parts, spec, None)[0].swapaxes(0, 1).reshape(len(q), -1)
        else:
            known = self._group(groups)
            places = mx.array(known.pad)
            shape = (known.count, known.longest)
            parts = [x[places].reshape(*shape, n, -1).swapaxes(1, 2) for x, n in zip((q, k, v), heads, strict=True)]
            mask = None if known.visible.all() else mx.array(known.visible)[:, None, None]
            looked = self._in_pieces(parts, spec, mask).swapaxes(1, 2)
            made = looked.reshape(known.count * known.longest, -1)[mx.array(known.unpad)]
        self.pieces.append(made)
        return made

    def fold(self, x: mx.array, count: int, *, interleaved: bool = False) -> mx.array:
        """See `TowerOps.fold`."""
        parted = x.reshape(-1, count, x.shape[-1])
        if interleaved:
            parted = parted.swapaxes(1, 2)
        return parted.reshape(len(parted), -1)

    def pool(self, x: mx.array, count: int) -> mx.array:
        """See `TowerOps.pool`."""
        return x.reshape(-1, count, x.shape[-1]).mean(axis=1)

    def clip(self, x: mx.array, least: Vector, most: Vector) -> mx.array:
        """See `TowerOps.clip`."""
        low, high = (self._weights.vector(limit).astype(x.dtype) for limit in (least, most))
        return mx.clip(x, low, high)

    def _in_pieces(self, parts: Sequence[mx.array], spec: Attention, mask: mx.array | None) -> mx.array:
        """Attention of some queries at a time. Shapes: (G, H or K, S, d) each; returns (G, H, S, d)."""
        queries, keys, values = parts
        count, _, length, _ = queries.shape
        step = max(MOST_SCORES // (count * spec.heads * length), 1)
        made = [
            self._attended(queries[:, :, begin : begin + step], keys, values, spec, mask)
            for begin in range(0, length, step)
        ]
        return made[0] if len(made) == 1 else mx.concatenate(made, axis=2)

    def _places(self, name: str) -> mx.array:
        return mx.array(np.asarray(self._given[name], np.int32))

    def _group(self, name: str) -> Groups:
        if name not in self._groups:
            self._groups[name] = grouped(np.asarray(self._given[name], np.int64))
        return self._groups[name]


class MLXPictureEncoder:
    """Implements `PictureEncoder`. Thread: the executor's, but for what says otherwise."""

    def __init__(self, tower: Tower, weights: Weights, dtype: mx.Dtype) -> None:
        self._tower = tower
        self._weights = weights
        self._dtype = dtype

    def encode(self, passes: Sequence[Mapping[str, HostArray]]) -> Generator[None, None, EncodedPicture]:
        """See `PictureEncoder.encode`."""
        made: list[list[HostArray]] = []
        for given in passes:
            ops = PatchOps(self._weights, given, self._dtype)
            outputs = self._tower.forward(ops)
            # What was computed is let go as soon as nothing behind it needs it any more.
            pieces = ops.pieces[::-1]
            ops.pieces.clear()
            while pieces:
                _evaluate(pieces.pop())
                yield
            wide = [output.astype(mx.float32) for output in outputs]
            _evaluate(*wide)
            made.append([np.array(each) for each in wide])
        rows, *deep = (np.concatenate(parts) for parts in zip(*made, strict=True))
        return EncodedPicture(rows, tuple(deep))

    def memory_bytes(self) -> int:
        """See `PictureEncoder.memory_bytes`. Thread: any."""
        return self._weights.nbytes

    def close(self) -> None:
        """See `PictureEncoder.close`."""
        mx.synchronize()
        self._weights = Weights()
        mx.clear_cache()


def load_tower(
    checkpoint: Checkpoint,
    tower: Tower,
    *,
    policy: Policy = "keep",
    dtype: mx.Dtype | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> MLXPictureEncoder:
    """Load a vision tower with its projector. Thread: the executor's.

    Raises:
        CheckpointError: a tensor is missing, left over under the tower's prefixes, misshaped or unreadable.
        QuantizationError: weights cannot be held so.
    """
    configure()
    dtype = dtype or compute_dtype(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    found = tower_tensors_of(tower, checkpoint)
    weights = filled(checkpoint, Declared(tower.weights, found, tower.stacks), policy, dtype, progress)
    return MLXPictureEncoder(tower, weights, dtype)


def tower_footprint(
    tower: Tower, found: Mapping[str, TensorInfo], *, policy: Policy, config: Mapping[str, JSON]
) -> Footprint:
    """What a tower will take besides `Tower.working_bytes`, its tensors by declared name. Thread: any."""
    dtype = compute_dtype(config.get("dtype") or config.get("torch_dtype"))
    sizes = {name: held_nbytes(info, policy, dtype) for name, info in found.items()}
    tables = {name for each in weights_in(tower.weights) if isinstance(each, Embedding) for name, _ in each.tensors()}
    embedding = sum(sizes[name] for name in tables)
    largest = max((4 * size // dtype.size for size in sizes.values()), default=0)
    return Footprint(embedding, (sum(sizes.values()) - embedding,), 0, largest, 0, lambda _: ())


def _evaluate(*arrays: mx.array) -> None:
    try:
        mx.eval(*arrays)
    except RuntimeError as error:
        raise ExecutionError(f"MLX could not look at a picture: {error}") from error
