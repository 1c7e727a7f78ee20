"""Token ids to text, one at a time, in constant time per token.

A token is a run of bytes and may begin or end inside a character. What is returned is valid Unicode at every moment:
bytes that may still become a character are held back, bytes that cannot become one turn into U+FFFD.
"""

import codecs
from collections.abc import Callable


class StreamingDetokenizer:
    """The text of one sequence as it grows.

    The texts of all `push` calls and of `finish`, joined, are the text of the whole sequence. Thread: one at a time.
    """

    __slots__ = ("_decoder", "_piece", "_strip_space")

    def __init__(self, piece: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        """Decode with `piece`, the bytes of a token.

        Args:
            piece: Bytes of a token id; empty for a token that is not to be seen.
            strip_space: Drop one space at the very beginning, the one SentencePiece puts before a text.
        """
        self._piece = piece
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; often a word, sometimes nothing."""
        return self._emit(self._decoder.decode(self._piece(token)))

    def finish(self) -> str:
        """What was held back, as U+FFFD; the detokenizer is then as new, for a text that goes on."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text
