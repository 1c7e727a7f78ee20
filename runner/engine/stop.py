"""Stop strings: found wherever they lie across pieces of text, with nothing of them let through.

The search runs over characters, not pieces, so the outcome cannot depend on how the text was cut: the stop string that
is complete first wins, and of several that end together the longest.

Source: A. V. Aho and M. J. Corasick, "Efficient string matching: an aid to bibliographic search", CACM 18(6), 1975.
"""

from collections import deque
from dataclasses import dataclass, field

from runner.errors import BadRequest

MAX_STOPS = 4096
MAX_STOP_CHARACTERS = 1 << 18


@dataclass(slots=True)
class StopAutomaton:
    """The automaton of a request's stop strings; immutable once built."""

    edges: dict[tuple[int, str], int] = field(default_factory=dict)
    """(state, character) to state: the trie of the stop strings. State 0 is the root."""
    fallback: list[int] = field(default_factory=lambda: [0])
    """For a state: the longest proper suffix of what it stands for that is a state too."""
    depth: list[int] = field(default_factory=lambda: [0])
    """Characters a state stands for."""
    match: list[int] = field(default_factory=lambda: [0])
    """Length of the longest stop string that ends in a state, 0 if none does."""

    def next_state(self, state: int, character: str) -> int:
        """The state after one more character."""
        edges = self.edges
        while (following := edges.get((state, character))) is None and state:
            state = self.fallback[state]
        return following or 0


def build_stops(stops: tuple[str, ...]) -> StopAutomaton | None:
    """The automaton for the given stop strings; None if there are none. Empty strings are ignored: they stop nothing.

    Raises:
        BadRequest: more or longer strings than a request may bring.
    """
    distinct = [stop for stop in dict.fromkeys(stops) if stop]
    if len(distinct) > MAX_STOPS:
        raise BadRequest(f"too many stop strings: {len(distinct)}, at most {MAX_STOPS} are allowed")
    if (characters := sum(map(len, distinct))) > MAX_STOP_CHARACTERS:
        raise BadRequest(
            f"stop strings too long: {characters} characters in all, at most {MAX_STOP_CHARACTERS} are allowed"
        )
    if not distinct:
        return None
    automaton = StopAutomaton()
    for stop in distinct:
        _insert(automaton, stop)
    _link(automaton)
    return automaton


def _insert(automaton: StopAutomaton, stop: str) -> None:
    state = 0
    for character in stop:
        following = automaton.edges.get((state, character))
        if following is None:
            following = len(automaton.depth)
            automaton.edges[state, character] = following
            automaton.depth.append(automaton.depth[state] + 1)
            automaton.fallback.append(0)
            automaton.match.append(0)
        state = following
    automaton.match[state] = len(stop)


def _link(automaton: StopAutomaton) -> None:
    """Fill in the fallbacks, nearer states first."""
    children: list[list[tuple[str, int]]] = [[] for _ in automaton.depth]
    for (state, character), child in automaton.edges.items():
        children[state].append((character, child))
    queue = deque(child for _, child in children[0])
    while queue:
        state = queue.popleft()
        for character, child in children[state]:
            suffix = automaton.next_state(automaton.fallback[state], character)
            automaton.fallback[child] = suffix
            automaton.match[child] = automaton.match[child] or automaton.match[suffix]
            queue.append(child)


class StopMatcher:
    """Follows one row's text and lets through what cannot belong to a stop string."""

    __slots__ = ("_automaton", "_held", "_state", "matched")

    def __init__(self, automaton: StopAutomaton | None) -> None:
        self._automaton = automaton
        self._state = 0
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take the next text; returns what may be shown now. After a match nothing more comes."""
        automaton = self._automaton
        if automaton is None:
            return text
        if self.matched:
            return ""
        text = self._held + text
        for index in range(len(self._held), len(text)):
            self._state = automaton.next_state(self._state, text[index])
            if length := automaton.match[self._state]:
                self.matched = True
                self._held = ""
                return text[: index + 1 - length]
        shown = len(text) - automaton.depth[self._state]
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text held back that turned out to belong to no stop string."""
        held, self._held = self._held, ""
        return held
