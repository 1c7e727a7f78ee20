"""From a request for embeddings to one that the engine can run: checked and tokenised, nothing cut.

Needs no device, so it is done outside the executor's thread. Thread: any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from models.errors import TokenizerError
from runner.engine.sequence import Vocabulary
from runner.engine.types import EmbeddingRequest, Request
from runner.errors import BadRequest, NoInput, NotImplementedHere, TextTooLong


class WholeTexts(Vocabulary, Protocol):
    """A vocabulary that knows what goes around a whole text. Thread: any."""

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids, special ones included. Raises TokenizerError."""
        ...


@dataclass(frozen=True, slots=True)
class PreparedTexts:
    """A request's texts as token ids, none empty, none too long; `dimensions` as it is to be cut to."""

    texts: tuple[tuple[int, ...], ...]
    dimensions: int | None


def prepare_texts(
    request: Request,
    tokenizer: WholeTexts,
    *,
    context_length: int,
    width: int,
    widths: Sequence[int],
    lower_case: bool,
) -> PreparedTexts:
    """Check and tokenise; the arguments are those of `EmbeddingEngine`.

    Raises:
        BadRequest: the request cannot be served.
        TextTooLong: a text has more tokens than the context.
        NoInput: a text has no tokens.
        NotImplementedHere: it is for text or pictures.
    """
    if not isinstance(request, EmbeddingRequest):
        raise NotImplementedHere("the loaded model makes embeddings: ask it for them at /embedding")
    _check_dimensions(request.dimensions, width, widths)
    limit = context_length if request.num_ctx is None else min(request.num_ctx, context_length)
    texts = [text.lower() for text in request.texts] if lower_case else request.texts
    # It is never more than the characters, and to ask takes long the first time.
    if any(len(text) > limit and tokenizer.fewest_tokens(text) > limit for text in texts):
        raise TextTooLong
    try:
        tokens = tuple(tuple(ids) for ids in tokenizer.encode_whole(texts))
    except TokenizerError as error:
        raise BadRequest(str(error)) from None
    if any(len(ids) > limit for ids in tokens):
        raise TextTooLong
    if not all(tokens):
        raise NoInput
    return PreparedTexts(tokens, request.dimensions)


def _check_dimensions(asked: int | None, width: int, widths: Sequence[int]) -> None:
    """Raises BadRequest where a vector cannot be cut so."""
    if asked is None:
        return
    if widths and asked not in widths:
        raise BadRequest(f"dimensions must be one of {', '.join(map(str, widths))}, not {asked}")
    if not 1 <= asked <= width:
        raise BadRequest(f"dimensions must be from 1 to {width}, not {asked}")
