"""Draws on MLX arrays, all rows of a step at once and without waiting: the same as `host` but for rounding.

Rows that go through the same stages are one group, and what is computed for a row has shapes that follow from its own
parameters alone. Within a group each stage is one operation over all rows, with their parameters as arrays.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from models.host import to_floats, to_ints
from models.sampling.draw import INVALID_TOKEN, Draw, Drawn, Sampling

_COLDEST, _HOTTEST = 1e-7, 1e30
_LEAST = 1e-30
_BLOCK = 64
_IMPOSSIBLE = -200.0
"""exp of it is 0 in float32."""


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Of the rows that asked. Shapes: chosen (R,), the others (R, K), in falling order."""

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    chosen: mx.array
    ids: mx.array | None
    values: mx.array | None

    def tops(self) -> list[tuple[tuple[int, float], ...]]:
        """Wait for the alternatives of each row."""
        if self.ids is None or self.values is None:
            return [() for _ in self.rows]
        width = self.ids.shape[1]
        pairs = list(zip(to_ints(self.ids.reshape(-1)), to_floats(self.values.reshape(-1)), strict=True))
        return [
            tuple(pair for pair in pairs[place * width : place * width + count] if pair[1] > -math.inf)
            for place, count in enumerate(self.counts)
        ]


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    """A step's tokens, perhaps not computed yet. Shapes: tokens int32 (N,). Thread: the executor's."""

    tokens: mx.array
    logprobs: _Logprobs | None = None

    def arrays(self) -> list[mx.array]:
        """What to evaluate for all of it to be computed."""
        if self.logprobs is None:
            return [self.tokens]
        told = (self.logprobs.chosen, self.logprobs.ids, self.logprobs.values)
        return [self.tokens, *(array for array in told if array is not None)]

    def read(self) -> list[Drawn]:
        """Wait for them, in the order of the draws."""
        tokens = to_ints(self.tokens)
        drawn = [Drawn(token) for token in tokens]
        if self.logprobs is None:
            return drawn
        chosen, tops = to_floats(self.logprobs.chosen), self.logprobs.tops()
        for row, logprob, top in zip(self.logprobs.rows, chosen, tops, strict=True):
            if tokens[row] != INVALID_TOKEN:
                drawn[row] = Drawn(tokens[row], logprob, top)
        return drawn


@dataclass(frozen=True, slots=True)
class _Stages:
    """What a row goes through."""

    penalties: bool
    greedy: bool = False
    width: int = 0
    """So many of the greatest scores are sorted; 0: none."""
    typical: bool = False
    nucleus: bool = False
    floor: bool = False


def sample(
    logits: mx.array, draws: Sequence[Draw], last: Mapping[int, mx.array] | None = None
) -> tuple[mx.array, DeviceSampled]:
    """Draw a token from each row of logits: the tokens, and the same with what was asked about them. Computes nothing.

    Where the greatest logit is infinite or NaN, which it is if any logit is NaN or +inf, and if all are -inf, the token
    is INVALID_TOKEN; so too where penalties made it that. Shapes: logits (N, V), a draw for each of the N; returns
    int32 (N,). Thread: the executor's.

    Args:
        logits: Of any float type; computed with in float32.
        draws: What to do with each row.
        last: By slot, the token that was sampled for it last, for the draws that are `unread`. Shapes: (1,) or ().
    """
    assert logits.ndim == 2
    assert logits.shape[0] == len(draws)
    logits = _masked(logits.astype(mx.float32), draws)
    groups: dict[_Stages, list[int]] = {}
    for row, draw in enumerate(draws):
        groups.setdefault(_stages(draw, logits.shape[1]), []).append(row)
    if len(groups) == 1:
        tokens = _tokens(logits, draws, next(iter(groups)), last or {})
    else:
        parts = [
            _tokens(logits[mx.array(rows)], [draws[row] for row in rows], stages, last or {})
            for stages, rows in groups.items()
        ]
        order = [row for rows in groups.values() for row in rows]
        tokens = mx.concatenate(parts)[mx.argsort(mx.array(order))]
    return tokens, DeviceSampled(tokens, _logprobs(logits, tokens, draws))


def _masked(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """The logits, -inf where a mask has no bit; NaN stays what it is. Shapes: (N, V), both."""
    if all(draw.mask is None for draw in draws):
        return logits
    width = logits.shape[1]
    every = b"\xff" * -(-width // 8)
    packed = b"".join((draw.mask or every)[: len(every)] for draw in draws)
    words = mx.array(np.frombuffer(packed, np.uint8)).reshape(len(draws), -1, 1)
    bits = (words >> mx.arange(8, dtype=mx.uint8)) & 1
    possible = bits.reshape(len(draws), -1)[:, :width] > 0
    return mx.where(possible | mx.isnan(logits), logits, -math.inf)


def _stages(draw: Draw, vocabulary: int) -> _Stages:
    sampling = draw.sampling
    if sampling.is_greedy:
        return _Stages(draw.penalizes, greedy=True)
    typical, nucleus = 0 < sampling.typical_p < 1, 0 < sampling.top_p < 1
    width = 0
    if 0 < sampling.top_k < vocabulary:
        # Few different widths, so few groups.
        width = min(1 << (sampling.top_k - 1).bit_length(), vocabulary)
    elif typical or nucleus:
        width = vocabulary
    return _Stages(draw.penalizes, width=width, typical=typical, nucleus=nucleus, floor=sampling.min_p > 0)


def _tokens(logits: mx.array, draws: Sequence[Draw], stages: _Stages, last: Mapping[int, mx.array]) -> mx.array:
    """The tokens of one group. Shapes: logits (R, V); returns int32 (R,)."""
    scores = _penalized(logits, draws, last) if stages.penalties else logits
    tokens = mx.argmax(scores, axis=-1) if stages.greedy else _drawn(scores, draws, stages)
    finite = mx.isfinite(mx.max(logits, axis=-1))
    if stages.penalties:
        finite = finite & mx.isfinite(mx.max(scores, axis=-1))
    return mx.where(finite, tokens.astype(mx.int32), INVALID_TOKEN)


def _drawn(scores: mx.array, draws: Sequence[Draw], stages: _Stages) -> mx.array:
    """Shapes: scores (R, V); returns integers (R,)."""
    ids = None
    whole = stages.width == scores.shape[1]
    if stages.width:
        ids, scores = _greatest(scores, stages.width)
    weights = _weights(scores, [draw.sampling for draw in draws], stages)
    if ids is not None and whole:
        weights = mx.put_along_axis(mx.zeros_like(weights), ids, weights, axis=-1)
        ids = None
    elif ids is not None:
        order = mx.argsort(ids, axis=-1)
        ids = mx.take_along_axis(ids, order, axis=-1)
        weights = mx.take_along_axis(weights, order, axis=-1)
    places = _pick(weights, _column([draw.uniform for draw in draws]))
    return (places if ids is None else mx.take_along_axis(ids, places, axis=-1))[:, 0]


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(list(values), dtype=mx.float32)[:, None]


def _penalized(logits: mx.array, draws: Sequence[Draw], last: Mapping[int, mx.array]) -> mx.array:
    """Repeat and presence penalty count once for each distinct token, frequency for each occurrence."""
    rows, ids, counts = [], [], []
    for row, draw in enumerate(draws):
        assert draw.counts is not None
        behind = draw.drafted
        if draw.unread:
            # It takes the place of an old token of the window, whichever it is itself.
            behind = (INVALID_TOKEN, *behind)
        own, often = draw.counts.after(behind)
        known = own != INVALID_TOKEN
        ids.append(mx.array(own[known], dtype=mx.int32))
        counts.append(mx.array(often[known], dtype=mx.float32))
        if not known.all():
            ids.append(last[draw.slot].reshape(1).astype(mx.int32))
            counts.append(mx.ones(1))
        rows.append(mx.full(own.size, row, dtype=mx.int32))
    seen = mx.zeros_like(logits).at[mx.concatenate(rows), mx.concatenate(ids)].add(mx.concatenate(counts))
    samplings = [draw.sampling for draw in draws]
    factor = _column([sampling.repeat_penalty or 1.0 for sampling in samplings])
    presence = _column([sampling.presence_penalty for sampling in samplings])
    frequency = _column([sampling.frequency_penalty for sampling in samplings])
    scores = mx.where(logits < 0, logits * factor, logits / factor) - presence - frequency * seen
    return mx.where(seen > 0, scores, logits)


def _weights(scores: mx.array, samplings: Sequence[Sampling], stages: _Stages) -> mx.array:
    """The weights of the candidates, 0 where they are ruled out. Shapes: scores (R, K), falling where it matters."""
    temperature = _column([min(max(sampling.temperature, _COLDEST), _HOTTEST) for sampling in samplings])
    heights = (scores - mx.max(scores, axis=-1, keepdims=True)) / temperature
    weights = mx.exp(heights)
    if stages.width:
        top_k = mx.array([sampling.top_k if sampling.top_k > 0 else stages.width for sampling in samplings])[:, None]
        weights = mx.where(mx.arange(scores.shape[1]) < top_k, weights, 0)
    if stages.typical:
        share = _column([max(sampling.typical_p, _LEAST) for sampling in samplings])
        weights = mx.where(_typical(heights, weights, share), weights, 0)
    kept = None
    if stages.nucleus:
        before = mx.cumsum(weights, axis=-1, inclusive=False)
        share = _column([max(sampling.top_p, _LEAST) for sampling in samplings])
        kept = before / (before[:, -1:] + weights[:, -1:]) < share
    if stages.floor:
        floor = _column([min(sampling.min_p, 1) for sampling in samplings]) * mx.max(weights, axis=-1, keepdims=True)
        kept = weights >= floor if kept is None else kept & (weights >= floor)
    return weights if kept is None else mx.where(kept, weights, 0)


def _typical(heights: mx.array, weights: mx.array, share: mx.array) -> mx.array:
    """The candidates whose surprise is nearest to the expected one, up to a share of the mass. Shapes: (R, K), bool.

    Source: C. Meister and others, "Locally Typical Sampling", TACL 11, 2023.
    """
    total = mx.sum(weights, axis=-1, keepdims=True)
    heights = mx.maximum(heights, _IMPOSSIBLE)
    expected = mx.sum(heights * weights, axis=-1, keepdims=True) / total
    order = mx.argsort(mx.abs(heights - expected), axis=-1)
    before = mx.cumsum(mx.take_along_axis(weights, order, axis=-1), axis=-1, inclusive=False)
    return mx.put_along_axis(mx.zeros(weights.shape, dtype=mx.bool_), order, before / total < share, axis=-1)


def _pick(weights: mx.array, uniform: mx.array) -> mx.array:
    """The place at `uniform` in the cumulative distribution. Shapes: weights (R, K), uniform (R, 1); returns (R, 1).

    First the block and then the place in it: a sum over all candidates one by one would be too imprecise.
    """
    padding = -weights.shape[1] % _BLOCK
    blocks = mx.pad(weights, [(0, 0), (0, padding)]).reshape(len(weights), -1, _BLOCK)
    sums = mx.sum(blocks, axis=-1)
    block, rest = _place(sums, uniform * mx.sum(sums, axis=-1, keepdims=True))
    inside, _ = _place(mx.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0], rest)
    return block * _BLOCK + inside


def _place(weights: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """Where the cumulative weight passes the target, never on a 0, and how far inside. Shapes: (R, K), else (R, 1)."""
    before = mx.cumsum(weights, axis=-1, inclusive=False)
    # The last of those that are possible and do not begin behind the target.
    reached = (weights > 0) & (before <= target)
    place = mx.max(mx.where(reached, mx.arange(weights.shape[1]), 0), axis=-1, keepdims=True)
    return place, target - mx.take_along_axis(before, place, axis=-1)


def _greatest(scores: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The greatest scores in falling order, equal ones by id: (ids, scores). Shapes: (R, V); both results (R, count).

    They lie in the `count` blocks with the greatest maxima, of equal ones the first, so sorting the maxima and then
    what these blocks hold finds the same as sorting all. That equal ones come by id rests on MLX's sort being stable.
    """
    ids = None
    if count * _BLOCK * 2 <= scores.shape[1]:
        padding = -scores.shape[1] % _BLOCK
        padded = mx.pad(scores, [(0, 0), (0, padding)], constant_values=-math.inf) if padding else scores
        blocks = padded.reshape(len(scores), -1, _BLOCK)
        chosen = mx.sort(mx.argsort(-mx.max(blocks, axis=-1), axis=-1)[:, :count], axis=-1)
        ids = (chosen[:, :, None] * _BLOCK + mx.arange(_BLOCK, dtype=chosen.dtype)).reshape(len(scores), -1)
        scores = mx.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(len(scores), -1)
    order = mx.argsort(-scores, axis=-1)[:, :count]
    scores = mx.take_along_axis(scores, order, axis=-1)
    return order if ids is None else mx.take_along_axis(ids, order, axis=-1), scores


def _logprobs(logits: mx.array, tokens: mx.array, draws: Sequence[Draw]) -> _Logprobs | None:
    rows = tuple(row for row, draw in enumerate(draws) if draw.top_logprobs is not None)
    if not rows:
        return None
    if len(rows) < len(draws):
        picked = mx.array(rows)
        logits, tokens = logits[picked], tokens[picked]
    mass = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, mx.maximum(tokens, 0)[:, None], axis=-1) - mass
    counts = tuple(min(draws[row].top_logprobs or 0, logits.shape[1]) for row in rows)
    if not any(counts):
        return _Logprobs(rows, counts, chosen[:, 0], None, None)
    ids, values = _greatest(logits, max(counts))
    return _Logprobs(rows, counts, chosen[:, 0], ids, values - mass)
