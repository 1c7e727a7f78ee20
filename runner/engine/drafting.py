"""Drafting: guesses at a row's next tokens, which one step of the model verifies together.

Owns the guesses and the decision whether they pay; refuses to know arrays and the model. A guess can only change how
fast a row speaks, never what it says: the engine keeps a drafted token if it is the one that was sampled in its place.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Protocol

PRICE = 0.25
"""What verifying a drafted token costs until it is measured, in tokens generated one by one: SmolLM2-135M on a CPU
takes 1.8 times as long for five tokens as for one."""


class Drafter(Protocol):
    """Guesses how a row goes on. One object serves one row. Thread: the executor's thread."""

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow; empty if there is nothing to go by.

        `tokens` is all that the row holds. It only grows from one call to the next.
        """
        ...

    def observe(self, proposed: int, accepted: int) -> None:
        """Learn how many tokens of the last proposal were right."""
        ...


class PromptLookup:
    """Guesses that what followed the longest recent repetition follows again, for as many tokens as it is long.

    An index leads from each pair of tokens to where it stood last, and a chain from there to where it stood before, as
    in LZ77: a token costs one entry, and a proposal no more than `_CANDIDATES` comparisons, however long the prompt.

    Source: A. Saxena, "Prompt Lookup Decoding", 2023.
    """

    _CANDIDATES = 16
    _LONGEST = 16
    """Repetitions that are longer count as this long; of equally long ones the most recent is taken."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], int] = {}
        self._before: list[int] = [-1]
        """For each place the one before where the same pair ends; -1: there is none."""

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """What followed the repetition when it stood there before; what reaches the end of the tokens goes round."""
        self._index(tokens)
        end, length = self._longest_match(tokens)
        period = tokens[end : end + limit]
        return [period[index % len(period)] for index in range(min(limit, length))]

    def observe(self, proposed: int, accepted: int) -> None:
        """There is nothing to learn: the text itself is the model."""

    def _index(self, tokens: Sequence[int]) -> None:
        """Enter the places that are new."""
        for place in range(len(self._before), len(tokens)):
            pair = (tokens[place - 1], tokens[place])
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = place

    def _longest_match(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Where the tokens continue that repeat the last ones best, and how many those are."""
        best, longest = 0, 0
        place = self._before[-1]
        for _ in range(self._CANDIDATES):
            if place < 0 or longest == self._LONGEST:
                break
            length = _common(tokens, place, self._LONGEST)
            if length > longest:
                best, longest = place + 1, length
            place = self._before[place]
        return best, longest


def _common(tokens: Sequence[int], place: int, most: int) -> int:
    """How many of the tokens up to `place` are the last of all."""
    length = 0
    while length < most and length <= place and tokens[place - length] == tokens[-1 - length]:
        length += 1
    return length


class StepCosts:
    """How long steps of so many tokens take, measured while they run; those with a piece of a prompt left out."""

    _ENOUGH = 3
    _KEPT = 5
    _FRESH_STEPS = 64

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._measured: dict[int, int] = {}
        """At which step a size was measured last."""
        self._steps = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of that many tokens took that long."""
        self._steps += 1
        self._measured[tokens] = self._steps
        self._seconds.setdefault(tokens, deque(maxlen=self._KEPT)).append(seconds)

    def needs_measuring(self, tokens: int) -> bool:
        """Whether it is not known how long a step of that many tokens takes at present: it grows with the contexts."""
        known = len(self._seconds.get(tokens, ())) >= self._ENOUGH
        return not known or self._steps - self._measured[tokens] > self._FRESH_STEPS

    def price(self, rows: int, drafted: int) -> float:
        """What each of `drafted` tokens adds to a step of `rows` rows, in tokens generated without drafting."""
        plain, verifying = self._seconds.get(rows), self._seconds.get(rows + drafted)
        if plain is None or verifying is None:
            return PRICE
        # The median is not disturbed by a step in which the machine did something else.
        alone, together = median(plain), median(verifying)
        return max(together - alone, 0.0) / drafted * rows / alone if alone > 0 else PRICE


class RowDrafting:
    """One row's drafter, its counts, and whether it is listened to.

    Accepted tokens are earnings and proposed ones expenses; both fade as new ones come. A drafter that has used up its
    credit is not asked for some tokens, each time for longer, until it earns again.
    """

    _CREDIT = 3.0
    _FADING = 0.9
    _SHORTEST_REST = 16
    _LONGEST_REST = 512

    def __init__(self, drafter: Drafter, most: int) -> None:
        """Propose `most` tokens at once at most."""
        self.proposed = 0
        self.accepted = 0
        self._drafter = drafter
        self._most = most
        self._balance = self._CREDIT
        self._rest = self._SHORTEST_REST
        self._wakes_at = 0

    def is_awake(self, generated: int) -> bool:
        """Whether the row may draft, having said that many tokens."""
        return generated >= self._wakes_at

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """What may follow, `room` tokens at most."""
        limit = min(self._most, room)
        return self._drafter.propose(tokens, limit) if limit > 0 else []

    def observe(self, proposed: int, accepted: int, *, price: float, generated: int) -> None:
        """Settle the accounts of a step that verified a proposal."""
        self.proposed += proposed
        self.accepted += accepted
        self._drafter.observe(proposed, accepted)
        self._balance = min(self._balance * self._FADING + accepted - price * proposed, self._CREDIT)
        if self._balance < 0:
            self._wakes_at = generated + self._rest
            self._rest = min(2 * self._rest, self._LONGEST_REST)
            self._balance = self._CREDIT / 2
        elif self._balance == self._CREDIT:
            self._rest = self._SHORTEST_REST

    def restart(self, drafter: Drafter) -> None:
        """Go on with another drafter: the row's tokens are no longer what the old one has seen."""
        self._drafter = drafter
