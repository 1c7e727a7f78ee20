"""A model's vocabulary as the engine of grammars wants it: the bytes of every id that has a logit."""

from functools import cached_property
from typing import Protocol

from llguidance import LLTokenizer, TokenizerWrapper

from models.errors import GrammarError


class Pieces(Protocol):
    """What a grammar asks of a tokenizer. Thread: any."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens after which the model has nothing more to say."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; empty for an id outside the vocabulary."""
        ...

    def is_special(self, token: int) -> bool:
        """Whether the token steers the model rather than being text."""
        ...

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """The ids of `text`."""
        ...


_MARK = "\x02"
"""A character that is hardly ever part of a longer token."""


class _Source:
    """What `TokenizerWrapper` reads; called, the tokens that the model would best say a forced text with."""

    bos_token_id = None

    def __init__(self, pieces: Pieces, width: int) -> None:
        self.tokens = [pieces.piece(token) for token in range(width)]
        stops = {token for token in pieces.stop_ids if 0 <= token < width}
        self.special_token_ids = sorted(stops | {token for token in range(width) if pieces.is_special(token)})
        self.stop_ids = sorted(stops)
        self.eos_token_id = self.stop_ids[0] if stops else width
        self._pieces = pieces

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are those of `text`, as the model's own tokenizer cuts them where that is possible."""
        if not isinstance(text, str):
            raise TypeError("a text is wanted, not bytes")
        for mark in ("", _MARK):
            tokens = self._pieces.encode(mark + text, add_bos=False)
            found = self._behind(mark, tokens)
            if found is not None and b"".join(self.tokens[token] for token in found) == text.encode():
                return found
        return self._greedy(text.encode())

    def _behind(self, mark: str, tokens: list[int]) -> list[int] | None:
        """The tokens behind the mark, in front of which SentencePiece puts a space; None if it does not stand alone."""
        if any(token in self._special for token in tokens):
            return None
        begun = b""
        for place, token in enumerate(tokens):
            if begun.endswith(mark.encode()):
                return tokens[place:]
            begun += self.tokens[token]
        return None

    def _greedy(self, text: bytes) -> list[int]:
        tokens = []
        while text:
            length = next(
                length for length in range(min(len(text), self._longest), 0, -1) if text[:length] in self._ids
            )
            tokens.append(self._ids[text[:length]])
            text = text[length:]
        return tokens

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.special_token_ids)

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {piece: token for token, piece in enumerate(self.tokens) if token not in self._special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids))


def engine_vocabulary(pieces: Pieces, width: int) -> LLTokenizer:
    """The vocabulary of `width` logits, of which those without a token are never allowed.

    All stop ids are ends of a text. Where a model has none, an id behind the last stands for the end, so that a
    finished answer ends all the same. Takes up to a second. Thread: any.

    Raises:
        GrammarError: the engine cannot do with it.
    """
    source = _Source(pieces, width)
    if not source.stop_ids:
        source.tokens.append(b"<end>")
        source.special_token_ids.append(width)
    try:
        return LLTokenizer(TokenizerWrapper(source), eos_token=source.stop_ids or [width])
    except ValueError as error:
        raise GrammarError(f"the model's vocabulary cannot be held to a grammar: {error}") from error
