"""A model's vocabulary as the engine of grammars wants it: the bytes of every id that has a logit."""

from typing import Protocol

from llguidance import LLTokenizer, TokenizerWrapper


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


class _Source:
    """The attributes that `TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(self, pieces: Pieces, width: int) -> None:
        self.tokens = [pieces.piece(token) for token in range(width)]
        stops = {token for token in pieces.stop_ids if 0 <= token < width}
        self.special_token_ids = sorted(stops | {token for token in range(width) if pieces.is_special(token)})
        self.stop_ids = sorted(stops)
        self.eos_token_id = self.stop_ids[0] if stops else width
        self._pieces = pieces

    def __call__(self, text: str) -> list[int]:
        return self._pieces.encode(text, add_bos=False)


def engine_vocabulary(pieces: Pieces, width: int) -> LLTokenizer:
    """The vocabulary of `width` logits, of which those without a token are never allowed.

    All stop ids are ends of a text. Where a model has none, an id behind the last stands for the end, so that a
    finished answer ends all the same. Takes up to a second. Thread: any.
    """
    source = _Source(pieces, width)
    if not source.stop_ids:
        source.tokens.append(b"<end>")
        source.special_token_ids.append(width)
    return LLTokenizer(TokenizerWrapper(source), eos_token=source.stop_ids or [width])
