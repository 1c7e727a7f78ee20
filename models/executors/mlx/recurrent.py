"""Recurrent layers on MLX: all rows of one length at once, and a row's tokens without a loop over them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import mlx.core as mx

from models.executors.mlx.weights import Weights
from models.ops import DeltaRule, ShortConv, StateSpace, Vector

CHUNK = 64
"""Tokens of a state space that are multiplied with each other, rather than through the state."""

Run: TypeAlias = Callable[[Sequence[mx.array], mx.array], tuple[mx.array, mx.array]]
"""From tokens (B, L, …) and states (B, …) to outputs (B, L, width) and states behind them."""


class Recurrence(ABC):
    """Implements the recurrent operations of `Ops[mx.array]`. Thread: the executor's."""

    _weights: Weights

    @abstractmethod
    def _recur(self, parts: Sequence[mx.array], layer: int, shape: tuple[int, ...], run: Run) -> mx.array:
        """Have rows of the step's tokens and the layer's states run. Shapes: parts (T, width); returns (T, width)."""

    def short_conv(self, x: mx.array, conv: ShortConv, layer: int) -> mx.array:
        """See `Ops.short_conv`."""
        taps, bias = self._weights.convolution(conv)

        def run(parts: Sequence[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
            return convolved(parts[0], state, taps, bias)

        return self._recur([x], layer, conv.shape, run)

    def delta_rule(
        self, q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, *, layer: int, spec: DeltaRule
    ) -> mx.array:
        """See `Ops.delta_rule`."""
        a_log, dt_bias = self._floats(spec.a_log), self._floats(spec.dt_bias)

        def run(parts: Sequence[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
            queries, keys = (_normed(_divided(part, spec.key_heads), spec) for part in parts[:2])
            gamma = mx.exp(-mx.exp(a_log) * _softplus(parts[3].astype(mx.float32) + dt_bias))
            beta = mx.sigmoid(parts[4].astype(mx.float32))
            values = _divided(parts[2], spec.heads)
            queries = queries * spec.key_dim**-0.5
            made, state = mx.fast.gated_delta_update(queries, keys, values.astype(mx.float32), gamma, beta, state)
            return made.astype(v.dtype), state

        return self._recur([q, k, v, a, b], layer, spec.shape, run)

    def state_space(
        self, x: mx.array, b: mx.array, c: mx.array, dt: mx.array, *, layer: int, spec: StateSpace
    ) -> mx.array:
        """See `Ops.state_space`."""
        rates, dt_bias, skip = -mx.exp(self._floats(spec.a_log)), self._floats(spec.dt_bias), self._floats(spec.d)

        def run(parts: Sequence[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
            values, keys, queries, steps = (part.astype(mx.float32) for part in parts)
            steps = mx.clip(_softplus(steps + dt_bias), spec.least_dt, spec.most_dt)
            values = _divided(values, spec.heads)
            keys, queries = _divided(keys, spec.groups), _divided(queries, spec.groups)
            made, state = scanned(values * steps[..., None], keys, queries, steps * rates, state)
            return (made + values * skip[:, None]).astype(x.dtype), state

        return self._recur([x, b, c, dt], layer, spec.shape, run)

    def _floats(self, vector: Vector) -> mx.array:
        return self._weights.vector(vector).astype(mx.float32)


def convolved(x: mx.array, state: mx.array, taps: mx.array, bias: mx.array | None) -> tuple[mx.array, mx.array]:
    """A causal convolution of each channel. Shapes: x (B, L, C), state (B, K - 1, C), taps (K, C); as x and state."""
    count, length = len(taps), x.shape[1]
    inputs = mx.concatenate([state.astype(x.dtype), x], axis=1)
    made = sum((inputs[:, tap : tap + length] * taps[tap] for tap in range(1, count)), inputs[:, :length] * taps[0])
    return made if bias is None else made + bias, inputs[:, length:].astype(state.dtype)


def scanned(x: mx.array, b: mx.array, c: mx.array, decay: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """A selective state space: within chunks by products of tokens, between them through their states.

    `decay` is the logarithm of what a token leaves of the state before it.

    Shapes: x (B, L, H, P), b and c (B, L, G, N), decay (B, L, H), state (B, H, P, N); returns as x and state.
    Source: Mamba-2 (arXiv 2405.21060), section 6.
    """
    batch, length, heads, width = x.shape
    groups, chunk = b.shape[2], min(CHUNK, length)
    chunks = -(-length // chunk)
    if missing := chunks * chunk - length:
        # Tokens that bring nothing and take nothing away.
        x, b, c = (mx.pad(each, [(0, 0), (0, missing), (0, 0), (0, 0)]) for each in (x, b, c))
        decay = mx.pad(decay, [(0, 0), (0, missing), (0, 0)])
    # Head h is head r of group g from here on: (B, C, G, R, …).
    x = x.reshape(batch, chunks, chunk, groups, -1, width).transpose(0, 1, 3, 4, 2, 5)
    b, c = (each.reshape(batch, chunks, chunk, groups, 1, -1).transpose(0, 1, 3, 4, 2, 5) for each in (b, c))
    sums = mx.cumsum(decay.reshape(batch, chunks, chunk, groups, -1).transpose(0, 1, 3, 4, 2), axis=-1)
    within = (c @ b.swapaxes(-1, -2)) * mx.exp(_differences(sums, sums)) @ x
    brought = (x * mx.exp(sums[..., -1:] - sums)[..., None]).swapaxes(-1, -2) @ b
    begins = _begins(brought, sums[..., -1], state.reshape(batch, 1, groups, -1, *state.shape[2:]))
    before = (c * mx.exp(sums)[..., None]) @ begins[:, :-1].swapaxes(-1, -2)
    made = (within + before).transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)
    return made[:, :length], begins[:, -1].reshape(state.shape)


def _begins(brought: mx.array, totals: mx.array, state: mx.array) -> mx.array:
    """The states before each chunk and behind the last. Shapes: brought (B, C, …), totals (B, C, G, R)."""
    sums = mx.pad(mx.cumsum(totals, axis=1), [(0, 0), (1, 0), (0, 0), (0, 0)]).transpose(0, 2, 3, 1)
    # What chunk j - 1 brought counts from j on; the state that was there counts as brought before all.
    weights = mx.exp(_differences(sums, sums)).transpose(0, 3, 4, 1, 2)
    whole = mx.concatenate([state, brought], axis=1)
    return mx.sum(weights[..., None, None] * whole[:, None], axis=2)


def _differences(queries: mx.array, keys: mx.array) -> mx.array:
    """Each query's sum less each key's that is not behind it. Shapes: (…, Q) both; (…, Q, Q)."""
    places = mx.arange(queries.shape[-1])
    gaps = queries[..., :, None] - keys[..., None, :]
    seen: mx.array = mx.where(places[None] <= places[:, None], gaps, mx.array(-mx.inf, gaps.dtype))
    return seen


def _divided(x: mx.array, heads: int) -> mx.array:
    """Shapes: (B, L, H * d); (B, L, H, d)."""
    divided: mx.array = x.reshape(*x.shape[:2], heads, -1)
    return divided


def _normed(x: mx.array, spec: DeltaRule) -> mx.array:
    """Each head divided by its length, float32: what an RMSNorm gives, by the root of its width."""
    share: mx.array = mx.fast.rms_norm(x.astype(mx.float32), None, spec.eps / spec.key_dim) * spec.key_dim**-0.5
    return share


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.array(0.0, x.dtype))
