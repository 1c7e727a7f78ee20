"""Thinking: the free text that an answer may begin with, up to the closing behind which its grammar is in force.

A closing is sought in the bytes that tokens stand for, so it is found wherever it lies across them. A token that ends a
closing and goes on behind it is allowed only if the grammar allows what follows.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from models.grammar import Compiled, Pieces
from runner.engine.stop import StopAutomaton, build_stops

KEPT = 16
"""Sets of closings whose places in the vocabulary are kept."""
_LATIN = "latin-1"
"""A character a byte."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """Text up to the first of some closings. Immutable."""

    automaton: StopAutomaton
    masks: tuple[bytes | None, ...]
    """For a state: the tokens but for those that go on behind a closing with what the grammar forbids. None: all."""

    def after(self, state: int, piece: bytes) -> tuple[int, bytes | None]:
        """The state behind a token's bytes; where a closing ends in them, what of them stands behind it."""
        for place, character in enumerate(piece.decode(_LATIN), 1):
            state = self.automaton.next_state(state, character)
            if self.automaton.match[state]:
                return state, piece[place:]
        return state, None


@dataclass(frozen=True, slots=True)
class _Exits:
    """The tokens that end some closing and go on behind it."""

    automaton: StopAutomaton
    rests: tuple[tuple[tuple[int, bytes], ...], ...]
    """For each state: such tokens, and what of them stands behind the closing."""


class ThinkingPlans:
    """Prepares what may come before a grammar. Thread: any, several at once."""

    def __init__(self, pieces: Pieces, width: int) -> None:
        """For the tokens of `width` logits."""
        self._pieces, self._width = pieces, width
        self._kept: OrderedDict[tuple[str, ...], _Exits] = OrderedDict()
        self._lock = threading.Lock()

    def plan(self, closings: tuple[str, ...], grammar: Compiled) -> Thinking | None:
        """Thinking that ends with one of the closings; None if there are none."""
        with self._lock:
            exits = self._kept.get(closings)
        if exits is None and (automaton := build_stops(tuple(map(_bytewise, closings)))) is not None:
            exits = _Exits(automaton, self._rests(closings, automaton))
            with self._lock:
                self._kept[closings] = exits
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        if exits is None:
            return None
        return Thinking(exits.automaton, tuple(self._mask(rests, grammar) for rests in exits.rests))

    def _rests(self, closings: tuple[str, ...], automaton: StopAutomaton) -> tuple[tuple[tuple[int, bytes], ...], ...]:
        whole = [closing.encode() for closing in closings]
        ends = tuple({closing[begin:] for closing in whole for begin in range(1, len(closing))})
        pieces = ((token, self._pieces.piece(token)) for token in range(self._width))
        candidates = [
            (token, piece)
            for token, piece in pieces
            if piece.startswith(ends) or any(closing in piece for closing in whole)
        ]
        # The masks are of no use yet, only the way through the text.
        thinking = Thinking(automaton, ())
        return tuple(
            tuple((token, rest) for token, piece in candidates if (rest := thinking.after(state, piece)[1]))
            for state in range(len(automaton.depth))
        )

    def _mask(self, rests: Sequence[tuple[int, bytes]], grammar: Compiled) -> bytes | None:
        refused = [token for token, rest in rests if not grammar.admits(rest)]
        if not refused:
            return None
        mask = bytearray(b"\xff" * -(-self._width // 8))
        for token in refused:
            mask[token // 8] &= ~(1 << token % 8)
        return bytes(mask)


def _bytewise(text: str) -> str:
    return text.encode().decode(_LATIN)
