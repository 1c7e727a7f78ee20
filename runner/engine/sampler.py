"""Sampling: from a step's logits to each row's next token, on the device and without waiting for it.

The order is that of Ollama's MLX runner (x/mlxrunner/sample at v0.32.5): repeat, presence and frequency penalty, top_k,
temperature, top_p, min_p, draw. Its classic runner (sample/ at v0.24.0) has the same order and no penalties. Neither
knows typical_p; here it comes after temperature and before top_p, as llama.cpp places it. Log-probabilities are of
the model's own distribution, before penalties and temperature, as in both.

Each row draws with its own key, split once per token, over candidates in an order that follows from its logits alone:
what a row says cannot depend on its company. Draws are taken back where the tokens before them turn out to be others
than drafted, so a row says the same with drafting as without.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from models.host import to_floats, to_ints
from runner.engine.types import SamplingParams, TokenLogprob

INVALID_TOKEN = -1
"""Stands for the token of a row whose logits are not finite."""

_BLOCK = 64
_TINY = 1e-7


class RowSampler:
    """How one row draws. Thread: the MLX thread."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        prompt: list[int],
        context: int,
        top_logprobs: int | None = None,
        rewinds: int = 0,
    ) -> None:
        """Begin a row.

        Args:
            params: How to draw.
            seed: Of the row's key.
            prompt: What the penalties look back on first.
            context: How far they look back if nobody said.
            top_logprobs: How many alternatives to tell of beside the token's own logprob; None: not even that.
            rewinds: How many draws may be taken back at once.
        """
        self.params = params
        self.top_logprobs = top_logprobs
        self._key = None if params.temperature <= 0 else mx.random.key(seed & (2**64 - 1))
        self._window = context if params.repeat_last_n < 0 else params.repeat_last_n
        self._history = mx.array(prompt[-self._window :], dtype=mx.int32) if _has_penalties(params) else None
        # What the draws to come rest on, as it was before each of the last draws.
        self._before: deque[tuple[mx.array | None, mx.array | None]] = deque(maxlen=rewinds)

    @property
    def takes_the_maximum(self) -> bool:
        """The row's token is the greatest logit, unmodified."""
        return self._key is None and self._history is None

    def sample(self, logits: mx.array) -> mx.array:
        """Draw the next token. Shapes: logits (V,); returns int32 (1,)."""
        self._before.append((self._key, self._history))
        scores = logits if self._history is None else _penalize(logits, self._history, self.params)
        if self._key is None:
            token = mx.argmax(scores, keepdims=True).astype(mx.int32)
        else:
            keys = mx.random.split(self._key)
            self._key = keys[0]
            token = _draw(scores, self.params, keys[1])
        if self._history is not None:
            # The token is not known to the host yet, so the next step's penalties are built on the array.
            self._history = mx.concatenate([self._history, token])[-self._window :]
        return token

    def rewind(self, draws: int) -> None:
        """Take back the last draws: the next ones are those that these would have been after other tokens."""
        if self.takes_the_maximum:
            return
        for _ in range(draws):
            self._key, self._history = self._before.pop()


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """A token's log-probability and the most probable alternatives, the best first."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()

    def told(self, token: int, piece: Callable[[int], bytes]) -> TokenLogprob:
        """The same in text; `piece` gives a token's bytes."""

        def text(of: int) -> str:
            return piece(of).decode("utf-8", errors="replace")

        # JSON knows no infinity, and an impossible token is no alternative.
        top = tuple(TokenLogprob(text(other), value) for other, value in self.top if value > -math.inf)
        return TokenLogprob(text(token), self.chosen, top)


@dataclass(frozen=True, slots=True)
class _LazyLogprobs:
    """Log-probabilities of the rows that asked, yet to be read."""

    rows: list[int]
    chosen: mx.array
    top: list[tuple[mx.array, mx.array] | None]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A step's tokens, yet to be read. Shapes: tokens int32 (N,)."""

    tokens: mx.array
    logprobs: _LazyLogprobs | None = None

    def arrays(self) -> list[mx.array]:
        """What to evaluate for the step to be complete."""
        if self.logprobs is None:
            return [self.tokens]
        top = [array for pair in self.logprobs.top if pair is not None for array in pair]
        return [self.tokens, self.logprobs.chosen, *top]

    def read(self) -> tuple[list[int], dict[int, RowLogprobs]]:
        """Wait for the step: the tokens, and by row index the log-probabilities of those rows that asked."""
        tokens = to_ints(self.tokens)
        if self.logprobs is None:
            return tokens, {}
        chosen = to_floats(self.logprobs.chosen)
        read = {}
        for row, logprob, top in zip(self.logprobs.rows, chosen, self.logprobs.top, strict=True):
            pairs = () if top is None else tuple(zip(to_ints(top[0]), to_floats(top[1]), strict=True))
            read[row] = RowLogprobs(logprob, pairs)
        return tokens, read


def sample_rows(logits: mx.array, samplers: Sequence[RowSampler]) -> Sampled:
    """Draw a token from each row of logits. Shapes: logits (N, V), a sampler for each of the N.

    A sampler that comes several times in succession draws successive tokens. Where the logits are not finite, the token
    is INVALID_TOKEN.
    """
    if all(sampler.takes_the_maximum for sampler in samplers):
        tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
    elif len(samplers) == 1:
        tokens = samplers[0].sample(logits[0])
    else:
        tokens = mx.concatenate([sampler.sample(logits[index]) for index, sampler in enumerate(samplers)])
    # The greatest logit is infinite or NaN if any is NaN or +inf, or if all are -inf.
    tokens = mx.where(mx.isfinite(mx.max(logits, axis=-1)), tokens, INVALID_TOKEN)
    return Sampled(tokens, _logprobs(logits, tokens, samplers))


def _logprobs(logits: mx.array, tokens: mx.array, samplers: Sequence[RowSampler]) -> _LazyLogprobs | None:
    rows = [index for index, sampler in enumerate(samplers) if sampler.top_logprobs is not None]
    if not rows:
        return None
    if len(rows) < len(samplers):
        picked = mx.array(rows)
        logits, tokens = logits[picked], tokens[picked]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, mx.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    top: list[tuple[mx.array, mx.array] | None] = []
    for index, row in enumerate(rows):
        count = min(samplers[row].top_logprobs or 0, logits.shape[-1])
        top.append(_greatest(logprobs[index], count) if count else None)
    return _LazyLogprobs(rows, chosen, top)


def _has_penalties(params: SamplingParams) -> bool:
    weighs = params.repeat_penalty not in (0, 1) or params.presence_penalty != 0 or params.frequency_penalty != 0
    return weighs and params.repeat_last_n != 0


def _penalize(logits: mx.array, history: mx.array, params: SamplingParams) -> mx.array:
    """Repeat and presence penalty count once for each distinct token, frequency for each occurrence."""
    if params.repeat_penalty not in (0, 1) or params.presence_penalty != 0:
        seen = logits[history]
        if params.repeat_penalty not in (0, 1):
            seen = mx.where(seen < 0, seen * params.repeat_penalty, seen / params.repeat_penalty)
        logits = mx.put_along_axis(logits, history, seen - params.presence_penalty, axis=-1)
    if params.frequency_penalty != 0:
        logits = logits.at[history].add(-params.frequency_penalty)
    return logits


def _draw(scores: mx.array, params: SamplingParams, key: mx.array) -> mx.array:
    """Shapes: scores (V,); returns int32 (1,)."""
    vocabulary = scores.shape[0]
    sorts = 0 < params.top_p < 1 or 0 < params.typical_p < 1
    ids = None
    if 0 < params.top_k < vocabulary:
        ids, scores = _greatest(scores, params.top_k)
    elif sorts:
        ids = mx.argsort(-scores)
        scores = scores[ids]
    scores = _truncate(scores / max(params.temperature, _TINY), params)
    index = mx.random.categorical(scores, key=key)[None]
    return (index if ids is None else ids[index]).astype(mx.int32)


def _truncate(scores: mx.array, params: SamplingParams) -> mx.array:
    """Set to -inf what typical_p, top_p and min_p rule out. Shapes: scores (K,), in falling order where it matters."""
    typical, nucleus, floor = 0 < params.typical_p < 1, 0 < params.top_p < 1, params.min_p > 0
    if not (typical or nucleus or floor):
        return scores
    probs = mx.softmax(scores, precise=True)
    keep = probs > 0
    if typical:
        keep = _typical(probs, params.typical_p)
        probs = mx.where(keep, probs, 0)
        probs = probs / mx.sum(probs)
    if nucleus:
        keep = keep & (mx.cumsum(probs, inclusive=False) < params.top_p)
    if floor:
        keep = keep & (probs >= min(params.min_p, 1) * mx.max(probs))
    return mx.where(keep, scores, -mx.inf)


def _typical(probs: mx.array, mass: float) -> mx.array:
    """The tokens whose surprise is nearest to the expected one, up to the given mass. Shapes: (K,) to bool (K,).

    Source: C. Meister and others, "Locally Typical Sampling", TACL 11, 2023.
    """
    surprise = mx.where(probs > 0, -mx.log(probs), 0)
    distance = mx.where(probs > 0, mx.abs(surprise - mx.sum(probs * surprise)), mx.inf)
    order = mx.argsort(distance)
    keep = mx.cumsum(probs[order], inclusive=False) < mass
    return mx.put_along_axis(mx.zeros(probs.shape, dtype=mx.bool_), order, keep, axis=-1)


def _greatest(scores: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The greatest scores in falling order: (ids, scores). Shapes: scores (V,), both results (count,).

    A partition of a whole vocabulary costs some percent of a small model's step on a CPU. The `count` greatest values
    lie in the `count` blocks with the greatest maxima, so partitioning the maxima and then those blocks finds the same.
    """
    ids = None
    if count * _BLOCK * 2 <= scores.shape[0]:
        padding = -scores.shape[0] % _BLOCK
        blocks = (mx.pad(scores, (0, padding), constant_values=-mx.inf) if padding else scores).reshape(-1, _BLOCK)
        chosen = mx.sort(mx.argpartition(-mx.max(blocks, axis=-1), count - 1)[:count])
        ids = (chosen[:, None] * _BLOCK + mx.arange(_BLOCK, dtype=chosen.dtype)).reshape(-1)
        scores = blocks[chosen].reshape(-1)
    if count < scores.shape[0]:
        best = mx.argpartition(-scores, count - 1)[:count]
        scores = scores[best]
        ids = best if ids is None else ids[best]
    order = mx.argsort(-scores)
    return (order if ids is None else ids[order]), scores[order]
