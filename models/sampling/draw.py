"""What a draw is told and what comes of it: plain data, the same for every executor."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

INVALID_TOKEN = -1
"""Stands for the token of a place whose logits are not finite."""

_WORD = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row draws its tokens. Order: mask, penalties, top_k, temperature, typical_p, top_p, min_p, draw."""

    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 40
    """0 is off."""
    top_p: float = 0.9
    """0 or 1 is off."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """0 or 1 is off."""
    repeat_penalty: float = 1.0
    """0 or 1 is off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """The token is the greatest score; nothing is drawn."""
        return self.temperature <= 0

    @property
    def has_penalties(self) -> bool:
        """The scores depend on the tokens before them."""
        return self.repeat_penalty not in (0, 1) or self.presence_penalty != 0 or self.frequency_penalty != 0


class TokenCounts:
    """The tokens that penalties look back on: the last `window` of a row, and how often each is among them.

    Pushing and popping cost the same for any window. Thread: one at a time.
    """

    def __init__(self, tokens: Sequence[int], window: int) -> None:
        """Begin with the last `window` of `tokens`; `window` is at least 1."""
        if window < 1:
            raise ValueError(f"a window of {window} tokens holds nothing")
        self._window = window
        # All tokens since, so that every push can be undone.
        self._tokens = array("i", tokens[-window:])
        self._begun = len(self._tokens)
        distinct, counts = np.unique(np.array(self._tokens, dtype=np.intp), return_counts=True)
        self._ids: npt.NDArray[np.intp] = distinct
        self._counts = counts.astype(np.int32)
        self._places = {token: place for place, token in enumerate(distinct.tolist())}

    def push(self, token: int) -> None:
        """Append a token; the oldest of a full window leaves it."""
        self._tokens.append(token)
        self._add(token)
        if len(self._tokens) > self._window:
            self._remove(self._tokens[-self._window - 1])

    def pop(self) -> None:
        """Undo the last push that was not undone yet; what had left the window for it returns."""
        assert len(self._tokens) > self._begun
        self._remove(self._tokens[-1])
        if len(self._tokens) > self._window:
            self._add(self._tokens[-self._window - 1])
        self._tokens.pop()

    def ids(self) -> npt.NDArray[np.intp]:
        """The distinct tokens, in any order: a view that holds until the next change. Shapes: returns (D,)."""
        return self._ids[: len(self._places)]

    def counts(self) -> npt.NDArray[np.int32]:
        """How often each of `ids` is in the window, at least once: a view like that one. Shapes: returns (D,)."""
        return self._counts[: len(self._places)]

    def after(self, tokens: Sequence[int]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int32]]:
        """Copies of `ids` and `counts` as they would be behind more tokens. Shapes: both (D,)."""
        for token in tokens:
            self.push(token)
        copies = self.ids().copy(), self.counts().copy()
        for _ in tokens:
            self.pop()
        return copies

    def _add(self, token: int) -> None:
        place = self._places.get(token)
        if place is not None:
            self._counts[place] += 1
            return
        place = len(self._places)
        if place == len(self._ids):
            room = max(64, 2 * place)
            self._ids, self._counts = np.resize(self._ids, room), np.resize(self._counts, room)
        self._places[token] = place
        self._ids[place], self._counts[place] = token, 1

    def _remove(self, token: int) -> None:
        place = self._places[token]
        if self._counts[place] > 1:
            self._counts[place] -= 1
            return
        del self._places[token]
        last = len(self._places)
        if place != last:
            moved = int(self._ids[last])
            self._ids[place], self._counts[place] = moved, self._counts[last]
            self._places[moved] = place


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw: from the logits of one wanted place of a step."""

    sampling: Sampling
    uniform: float
    """In [0, 1): where in the cumulative distribution of the kept candidates, in the order of their ids."""
    slot: int
    counts: TokenCounts | None = None
    """None: there are no penalties."""
    drafted: tuple[int, ...] = ()
    """Tokens that stand between those of `counts` and this place."""
    unread: bool = False
    """The token that was sampled for the slot last stands there too, and nobody has read it yet."""
    top_logprobs: int | None = None
    """How many alternatives to tell of beside the token's own logprob; None: not even that."""
    mask: bytes | None = None
    """A bit for each id, the first one the least of the first byte: 0 where the token is impossible, as if its logit
    were -inf. Bits behind the last id are not looked at. None: all are possible."""

    @property
    def penalizes(self) -> bool:
        """The scores are not the logits."""
        return self.counts is not None and self.sampling.has_penalties


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token; its log-probability and the most probable alternatives, the best first, where they were asked for."""

    token: int
    """INVALID_TOKEN where the logits are not finite; nothing is told of its probability then."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """Without the impossible ones, whose log-probability is -inf."""


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to a row's seed and the count of tokens it has drawn. Thread: any.

    Any integers will do; of each the last 64 bits count.

    It is the position's output of the generator SplitMix64 whose state is the mixed seed, so that neighbouring seeds do
    not walk along the same sequence.

    Source: G. Steele, D. Lea and C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    return (_mix(_mix(seed) + (position + 1) * _GOLDEN_GAMMA) >> 11) / 2**53


def _mix(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
