"""Draws on the host, in numpy, one row after the other: what a row says cannot depend on its company.

The vocabulary is never sorted (`thresholds`): the token is looked up in the cumulative distribution in the order of
ids. A row costs some passes over its logits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.sampling.draw import INVALID_TOKEN, Draw, Drawn, Sampling
from models.sampling.thresholds import Floats, Ids, Mask, greatest, reaching

_COLDEST, _HOTTEST = 1e-7, 1e30
_BLOCK = 256
_HEAD, _LONG = 128, 16384
"""Of more candidates than the second, so many are tried for a nucleus first."""
_IMPOSSIBLE = np.float32(-200)
"""exp of it is 0 in float32."""


class _Candidates(NamedTuple):
    """What may still be drawn: rising ids, None for the whole vocabulary, and weights >= 0. Shapes: both (K,)."""

    ids: Ids | None
    weights: Floats

    def only(self, kept: Mask) -> "_Candidates":
        """Those for which `kept` holds; weights of a vocabulary of which much is kept are set to 0 instead."""
        if self.ids is None and np.count_nonzero(kept) * 8 > kept.size:
            return _Candidates(None, self.weights * kept)
        return self.at(np.flatnonzero(kept))

    def at(self, places: Ids) -> "_Candidates":
        """Those at some places, in rising order."""
        return _Candidates(places if self.ids is None else self.ids[places], self.weights[places])


def sample(logits: Floats, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw a token from each row of logits. Shapes: logits (N, V), a draw for each of the N. Thread: any.

    Where the greatest logit is infinite or NaN, which it is if any logit is NaN or +inf, and if all are -inf, the token
    is INVALID_TOKEN; so too where penalties made it that. The logits are only read. No draw is `unread`: what the host
    samples is known at once.
    """
    assert logits.ndim == 2
    assert len(logits) == len(draws)
    assert not any(draw.unread for draw in draws)
    # A score that overflows to -inf is one of an impossible token, and penalties beyond all measure leave no token.
    with np.errstate(over="ignore", invalid="ignore"):
        if all(_takes_the_maximum(draw) for draw in draws):
            return _maxima(logits)
        return [_drawn(row, draw) for row, draw in zip(logits, draws, strict=True)]


def _takes_the_maximum(draw: Draw) -> bool:
    return draw.sampling.is_greedy and draw.top_logprobs is None and not draw.penalizes and draw.mask is None


def _maxima(logits: Floats) -> list[Drawn]:
    tokens = logits.argmax(axis=1)
    finite = np.isfinite(logits[np.arange(len(logits)), tokens])
    return [Drawn(token) for token in np.where(finite, tokens, INVALID_TOKEN).tolist()]


def _drawn(logits: Floats, draw: Draw) -> Drawn:
    peak = logits.max()
    if not math.isfinite(peak):
        return Drawn(INVALID_TOKEN)
    scores, highest = logits, peak
    if draw.penalizes:
        scores = _penalized(logits, draw)
        highest = scores.max()
        if not math.isfinite(highest):
            return Drawn(INVALID_TOKEN)
    if draw.mask is not None:
        return _drawn_from(_possible(draw.mask, logits.size), logits, scores, draw)
    return _token_of(logits, peak, scores, highest, draw)


def _possible(mask: bytes, width: int) -> Ids:
    """The ids whose bit is set, rising."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=width, bitorder="little")
    return np.flatnonzero(bits.view(np.bool_))


def _drawn_from(ids: Ids, logits: Floats, scores: Floats, draw: Draw) -> Drawn:
    """Draw as if there were no other tokens."""
    scores = scores[ids]
    logits = scores if not draw.penalizes else logits[ids]
    highest = scores.max(initial=-math.inf)
    peak = logits.max(initial=-math.inf)
    if not (math.isfinite(highest) and math.isfinite(peak)):
        return Drawn(INVALID_TOKEN)
    drawn = _token_of(logits, peak, scores, highest, draw)
    return Drawn(int(ids[drawn.token]), drawn.logprob, tuple((int(ids[place]), value) for place, value in drawn.top))


def _token_of(logits: Floats, peak: np.float32, scores: Floats, highest: np.float32, draw: Draw) -> Drawn:
    """The token, as a place among the logits. Shapes: (K,)."""
    if draw.sampling.is_greedy:
        token = int(scores.argmax())
    else:
        token = _pick(_candidates(scores, highest, draw.sampling), draw.uniform)
    if draw.top_logprobs is None:
        return Drawn(token)
    return _told(logits, peak, token, draw.top_logprobs)


def _told(logits: Floats, peak: np.float32, token: int, count: int) -> Drawn:
    """Log-probabilities of the model's own distribution over these."""
    heights = logits - peak
    mass = math.log(np.exp(heights, out=heights).sum()) + float(peak)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = greatest(logits, count)
        values = logits[ids].astype(np.float64) - mass
        order = np.argsort(-values, kind="stable")[: np.count_nonzero(values > -math.inf)]
        top = tuple(zip(ids[order].tolist(), values[order].tolist(), strict=True))
    return Drawn(token, float(logits[token]) - mass, top)


def _penalized(logits: Floats, draw: Draw) -> Floats:
    """A copy with the penalties: repeat and presence once for each distinct token, frequency for each occurrence."""
    assert draw.counts is not None
    sampling = draw.sampling
    ids, counts = draw.counts.after(draw.drafted) if draw.drafted else (draw.counts.ids(), draw.counts.counts())
    seen = logits[ids]
    if sampling.repeat_penalty not in (0, 1):
        factor = np.float32(sampling.repeat_penalty)
        seen = np.where(seen < 0, seen * factor, seen / factor)
    seen -= np.float32(sampling.presence_penalty)
    if sampling.frequency_penalty != 0:
        seen -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
    scores = logits.copy()
    scores[ids] = seen
    return scores


def _candidates(scores: Floats, peak: np.float32, sampling: Sampling) -> _Candidates:
    ids = None
    if 0 < sampling.top_k < scores.size:
        ids = greatest(scores, sampling.top_k)
        scores = scores[ids]
    heights = scores - peak
    if sampling.temperature != 1:
        heights *= np.float32(1 / min(max(sampling.temperature, _COLDEST), _HOTTEST))
    candidates = _Candidates(ids, np.exp(heights))
    if 0 < sampling.typical_p < 1:
        candidates = candidates.only(_typical(heights, candidates.weights, sampling.typical_p))
    weights = candidates.weights
    nucleus = 0 < sampling.top_p < 1
    total = float(weights.sum()) if nucleus else 0.0
    # Both of the last are thresholds on the same weights, so the cheaper may come first; the mass is of all.
    mass = sampling.top_p * total
    if sampling.min_p > 0:
        candidates = candidates.only(weights >= np.float32(min(sampling.min_p, 1)) * weights.max())
        weights = candidates.weights
        total = float(weights.sum()) if nucleus else 0.0
    if nucleus and mass < total:
        if weights.size > _LONG:
            head = greatest(weights, _HEAD)
            of_head = float(weights[head].sum())
            if of_head >= mass:
                # Most often: what a model says next is among a few.
                candidates, total = candidates.at(head), of_head
                weights = candidates.weights
        candidates = candidates.only(reaching(weights, weights, total, mass))
    return candidates


def _typical(heights: Floats, weights: Floats, share: float) -> Mask:
    """The candidates whose surprise is nearest to the expected one, up to a share of the mass.

    The surprise is the negative height, but for a number that is the same for all. Overwrites `heights`.

    Source: C. Meister and others, "Locally Typical Sampling", TACL 11, 2023.
    """
    total = float(weights.sum())
    # Where the weight is 0, its product with -inf is not to be NaN.
    np.maximum(heights, _IMPOSSIBLE, out=heights)
    heights -= np.float32(float((heights * weights).sum()) / total)
    np.abs(heights, out=heights)
    np.negative(heights, out=heights)
    return reaching(heights, weights, total, share * total)


def _pick(candidates: _Candidates, uniform: float) -> int:
    """The token at `uniform` in the cumulative distribution."""
    weights, begin = candidates.weights, 0
    if weights.size > 8 * _BLOCK:
        whole = weights.size - weights.size % _BLOCK
        sums = np.append(weights[:whole].reshape(-1, _BLOCK).sum(axis=1), weights[whole:].sum())
        block, uniform = _place(sums, uniform)
        begin = block * _BLOCK
        weights = weights[begin : begin + _BLOCK]
    place = begin + _place(weights, uniform)[0]
    return place if candidates.ids is None else int(candidates.ids[place])


def _place(weights: Floats, uniform: float) -> tuple[int, float]:
    """Where `uniform` falls among the weights, never on a 0, and where inside that one. Shapes: weights (K,)."""
    cumulative = weights.cumsum(dtype=np.float64)
    target = uniform * cumulative[-1]
    place = int(cumulative.searchsorted(target, side="right"))
    if place == weights.size:
        place = int(np.flatnonzero(weights)[-1])
    before = cumulative[place] - weights[place]
    return place, min(max(float((target - before) / weights[place]), 0.0), 1.0)
