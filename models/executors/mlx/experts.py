"""Routers and experts on MLX: stacked matrices, gathered by pick; sorted by expert where there are many picks.

Source: mlx v0.32 `mx.gather_mm` and `mx.gather_qmm`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from models.executors.mlx.matrices import DenseMatrix, HeldMatrix, QuantizedMatrix, SideBySide, joined
from models.ops import Routing
from models.to_mlx import PackedArrays

SORTED_PICKS = 64
"""From so many picks on it pays to have those of one expert lie together."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One matrix of every expert. Shapes: values (E, N, K) or packed like it, bias (E, N) or None."""

    matrix: HeldMatrix

    def multiply(self, x: mx.array, picks: mx.array, *, is_sorted: bool) -> mx.array:
        """Shapes: x (P, 1, K), picks (P,); returns (P, N)."""
        matrix = self.matrix
        if isinstance(matrix, DenseMatrix):
            y = mx.gather_mm(x, matrix.values.swapaxes(-1, -2), rhs_indices=picks, sorted_indices=is_sorted)
        else:
            packed = matrix.packed
            y = mx.gather_qmm(
                x,
                packed.weight,
                packed.scales,
                packed.biases,
                rhs_indices=picks,
                transpose=True,
                group_size=packed.spec.group_size,
                bits=packed.spec.bits,
                mode=packed.spec.mode,
                sorted_indices=is_sorted,
            )
            if packed.global_scale is not None:
                y = y * packed.global_scale[picks][:, None, None].astype(y.dtype)
        y = y.squeeze(1)
        return y if matrix.bias is None else y + matrix.bias[picks]


@dataclass(frozen=True, slots=True)
class HeldExperts:
    """All experts of a layer; gate and up are one stack where they are held alike."""

    gate_up: tuple[Stack, ...]
    down: Stack
    gated: bool

    def run(
        self,
        x: mx.array,
        picks: mx.array,
        weights: mx.array,
        activate: Callable[..., mx.array],
        *,
        on_input: bool = False,
    ) -> mx.array:
        """See `Ops.experts`; `activate` is given gate and up, or up alone.

        Shapes: x (T, D), picks and weights (T, k); returns (T, D).
        """
        tokens, each = picks.shape
        flat, is_sorted = picks.reshape(-1), tokens * each >= SORTED_PICKS
        order = mx.argsort(flat) if is_sorted else mx.arange(tokens * each)
        rows, own = x[order // each][:, None], flat[order]
        if on_input:
            rows = rows * weights.reshape(-1)[order][:, None, None].astype(rows.dtype)
        parts = [stack.multiply(rows, own, is_sorted=is_sorted) for stack in self.gate_up]
        if self.gated and len(parts) == 1:
            parts = [*mx.split(parts[0], 2, axis=-1)]
        made = self.down.multiply(activate(*parts)[:, None], own, is_sorted=is_sorted)
        if is_sorted:
            made = made[mx.argsort(order)]
        made = made.reshape(tokens, each, -1)
        return (made if on_input else made * weights[..., None].astype(made.dtype)).sum(axis=1)

    def arrays(self) -> list[mx.array]:
        """What is held."""
        return [array for stack in (*self.gate_up, self.down) for array in stack.matrix.arrays()]


def held_experts(pairs: Sequence[tuple[Sequence[HeldMatrix], HeldMatrix]]) -> HeldExperts:
    """Of every expert gate and up, or up alone, and down, stacked."""
    gated = len(pairs[0][0]) > 1
    both = [joined(parts) for parts, _ in pairs]
    whole = [each for each in both if not isinstance(each, SideBySide)]
    down = Stack(_stacked([each for _, each in pairs]))
    if len(whole) == len(both) and _alike(whole):
        return HeldExperts((Stack(_stacked(whole)),), down, gated)
    stacks = tuple(Stack(_stacked([parts[index] for parts, _ in pairs])) for index in range(1 + gated))
    return HeldExperts(stacks, down, gated)


def _alike(matrices: Sequence[HeldMatrix]) -> bool:
    """Whether matrices of one shape are held in one way."""
    kinds = {each.packed.spec if isinstance(each, QuantizedMatrix) else None for each in matrices}
    return len(kinds) == 1


def _stacked(matrices: Sequence[HeldMatrix]) -> HeldMatrix:
    biases = [each.bias for each in matrices if each.bias is not None]
    bias = mx.stack(biases) if biases else None
    quantized = [each for each in matrices if isinstance(each, QuantizedMatrix)]
    if len(quantized) < len(matrices) or not _alike(matrices):
        return DenseMatrix(mx.stack([dense_values(each) for each in matrices]), bias)
    packed = [each.packed for each in quantized]
    offsets = [each.biases for each in packed if each.biases is not None]
    scales = [each.global_scale.reshape(()) for each in packed if each.global_scale is not None]
    whole = PackedArrays(
        mx.stack([each.weight for each in packed]),
        mx.stack([each.scales for each in packed]),
        mx.stack(offsets) if offsets else None,
        packed[0].spec,
        mx.stack(scales) if scales else None,
    )
    return QuantizedMatrix(whole, quantized[0].dtype, bias)


def dense_values(matrix: HeldMatrix) -> mx.array:
    """The values (N, K) of a matrix, whatever it is held in."""
    return matrix.values if isinstance(matrix, DenseMatrix) else matrix.rows(mx.arange(matrix.packed.weight.shape[0]))


def route(logits: mx.array, routing: Routing, bias: mx.array | None) -> tuple[mx.array, mx.array]:
    """The picked experts and their weights. Shapes: logits (T, E), bias (E,) or None; returns two (T, picked)."""
    logits = logits.astype(mx.float32)
    scores = mx.softmax(logits, axis=-1) if routing.score == "softmax" else mx.sigmoid(logits)
    ranked = logits if routing.by_logits else scores
    chosen = ranked if bias is None else ranked + bias.astype(mx.float32)
    if routing.groups > 1:
        grouped = chosen.reshape(len(chosen), routing.groups, -1)
        worth = mx.topk(grouped, routing.best_of_group, axis=-1).sum(axis=-1)
        least = mx.topk(worth, routing.kept_groups, axis=-1).min(axis=-1, keepdims=True)
        chosen = mx.where((worth >= least)[..., None], grouped, -mx.inf).reshape(chosen.shape)
    picks = mx.argpartition(-chosen, kth=routing.picked - 1, axis=-1)[:, : routing.picked]
    weights = mx.take_along_axis(scores, picks, axis=-1)
    if routing.normalized:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + routing.floor)
    return picks, weights * routing.scale
