"""Where one answer stands in its grammar, and which tokens may follow."""

import re
from collections.abc import Sequence

from llguidance import LLMatcher

from models.errors import GrammarError

_PLACE = re.compile(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?|^failed to compile JSON schema: ")


class Matcher:
    """One answer's place in a grammar. Thread: any, one at a time; lets others run while it computes."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        """Take over a matcher that nobody else uses."""
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """The answer is complete, and nothing but its end may follow."""
        return self._matcher.is_stopped()

    def mask(self) -> bytes:
        """The tokens that may follow: a bit for each id, the first one the least of the first byte.

        Raises:
            GrammarError: the engine failed.
        """
        allowed = self._matcher.compute_bitmask()
        self._check()
        return allowed

    def masks(self, drafted: Sequence[int]) -> list[bytes]:
        """The masks of the next place and of those behind each drafted token, all of which the grammar admits.

        Raises:
            GrammarError: the engine failed.
        """
        masks = [self.mask()]
        for token in drafted:
            self.accept(token)
            masks.append(self.mask())
        if drafted and not self._matcher.rollback(len(drafted)):
            self._check()
        return masks

    def admitted(self, tokens: Sequence[int]) -> int:
        """How many of these, one behind the other, may follow."""
        return self._matcher.validate_tokens(list(tokens))

    def accept(self, token: int) -> None:
        """Take the answer's next token.

        Raises:
            GrammarError: the grammar does not admit it, or the engine failed.
        """
        if not self._matcher.consume_token(token):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(reason_of(self._matcher.get_error()))


def reason_of(message: str) -> str:
    """The reason in what the engine says, without where in our own text it is, and without the engine's state."""
    first, *others = message.strip().splitlines() or [""]
    reason = _PLACE.sub("", first).strip()
    if reason.endswith(":"):
        # Of a regular expression, whose text comes in between.
        return " ".join([reason, *(line.removeprefix("error: ") for line in others if line.startswith("error: "))])
    return reason
