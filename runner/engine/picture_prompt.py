"""From a prompt that refers to pictures to tokens: cut at its tags, each text tokenised alone, expansions put between.

A picture is decoded and made ready once, however often it is referred to. Thread: any but the event loop's; one request
may take some hundred megabytes here, which is why the loop lets few in at once.

Source of the tags and of what is refused in which words: Ollama v0.24.0 runner/ollamarunner/runner.go, v0.34.4
mlxrunner.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from models.vision import PictureError, Vision
from runner.engine.pictures import MAX_INPUT_SIDE, decode_picture
from runner.engine.sight import PlacedPicture, PreparedPicture, Sight, identified
from runner.engine.types import InputImage
from runner.errors import BadRequest, PromptTooLong

logger = logging.getLogger("runner.engine")

MAX_PREPARED_BYTES = 1 << 30
"""What the pictures of one request may take, made ready."""
MAX_PIXELS = 512_000_000
"""What the pictures of one request may have together: forty photos of 12 megapixels, ten seconds of decoding."""
_TAG = re.compile(r"\[img-([0-9]+)\]")
_SHOWN_DIGITS = 20


class Encode(Protocol):
    """Makes tokens of text."""

    def __call__(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of a text; of a hopelessly long one those of its ends. Raises BadRequest."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens, and where pictures stand among them."""

    tokens: list[int]
    sight: Sight | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive tokens of a prompt: a text, or a picture's expansion."""

    tokens: Sequence[int]
    picture: PreparedPicture | None = None


def read_prompt(
    prompt: str,
    images: Sequence[InputImage],
    vision: Vision | None,
    encode: Encode,
    *,
    limit: int,
    truncates: bool,
) -> Prompt:
    """The prompt with its pictures. Without any, what looks like a reference is text.

    Args:
        prompt: as it was sent.
        images: the request's, of which some may be referred to by no tag.
        vision: the model's; None: it sees nothing.
        encode: makes tokens of text.
        limit: tokens that a row may hold.
        truncates: what is too long is truncated then; what is far from either end may be left out.

    Raises:
        BadRequest: a picture is broken or too large, or a tag refers to none, or the model sees nothing.
        PromptTooLong: there are too many tokens.
    """
    if not images:
        return Prompt(encode(prompt, add_bos=True))
    if vision is None:
        raise BadRequest("this model does not support image input")
    # Of several with one id the first counts.
    files = {str(image.id): image for image in reversed(images)}
    texts, wanted = _cut(prompt, limit)
    for number in wanted:
        if number not in files:
            raise BadRequest(f"invalid image index: {number[:_SHOWN_DIGITS]}")
    if unused := sorted(set(files) - set(wanted)):
        logger.warning("images that the prompt does not refer to", extra={"fields": {"ids": ",".join(unused)[:200]}})
    first, *others = texts
    pieces = [
        _Piece(encode(first, add_bos=True)),
        *(_Piece(encode(text, add_bos=False) if text else ()) for text in others),
    ]
    most = None if truncates else limit
    length = sum(len(piece.tokens) for piece in pieces)
    _check_length(length, most)
    ready = _all_prepared(Counter(wanted), files, vision, length, most)
    shown = [_Piece(ready[number].tokens, ready[number]) for number in wanted]
    pieces = [pieces[0], *chain.from_iterable(zip(shown, pieces[1:], strict=True))]
    return _joined(_ends(pieces, limit), vision)


def _cut(prompt: str, limit: int) -> tuple[list[str], list[str]]:
    """A prompt's texts, and the numbers of the pictures between them."""
    if (most := prompt.count("[img-")) > limit:
        raise BadRequest(f"the prompt refers to images {most} times, and the context has {limit} tokens")
    pieces = _TAG.split(prompt)
    return pieces[::2], [number.lstrip("0") or "0" for number in pieces[1::2]]


def _check_length(length: int, most: int | None) -> None:
    """Raise PromptTooLong early: before more is decoded, or made as long as it is."""
    if most is not None and length >= most:
        raise PromptTooLong(length, most)


def _ends(pieces: list[_Piece], limit: int) -> list[_Piece]:
    """Those that truncation may leave something of: the others have as many tokens as fit on either side of them."""
    begin = length = 0
    while begin < len(pieces) and length < limit:
        length += len(pieces[begin].tokens)
        begin += 1
    end, length = len(pieces), 0
    while end > begin and length < limit:
        end -= 1
        length += len(pieces[end].tokens)
    return pieces[:begin] + pieces[end:]


def _joined(pieces: Sequence[_Piece], vision: Vision) -> Prompt:
    tokens: list[int] = []
    placed: list[PlacedPicture] = []
    for piece in pieces:
        if piece.picture is not None:
            placed.append(PlacedPicture(len(tokens), piece.picture))
        tokens += piece.tokens
    return Prompt(tokens, Sight(vision, tuple(placed)) if placed else None)


def _all_prepared(
    wanted: Counter[str], files: Mapping[str, InputImage], vision: Vision, length: int, most: int | None
) -> dict[str, PreparedPicture]:
    """Each picture, made ready once.

    Whether it is too much is judged before the next one is decoded: a small file may be a large picture.

    Args:
        wanted: how often each is referred to.
        files: the request's.
        vision: the model's.
        length: tokens of text.
        most: so many tokens are too many; None: there is no such number.

    Raises:
        BadRequest: one cannot be read, or they are too large together.
        PromptTooLong: they have too many tokens.
    """
    ready: dict[str, PreparedPicture] = {}
    pixels = nbytes = 0
    for number, times in wanted.items():
        picture, area = _prepared(number, files[number].data, vision)
        ready[number] = picture
        pixels, nbytes, length = pixels + area, nbytes + picture.prepared.nbytes, length + times * len(picture.tokens)
        _check_length(length, most)
        if pixels > MAX_PIXELS:
            raise BadRequest(f"the request's images have more than {MAX_PIXELS // 10**6} megapixels together")
        if nbytes > MAX_PREPARED_BYTES:
            raise BadRequest(f"the request's images take more than {MAX_PREPARED_BYTES >> 20} MiB when made ready")
    return ready


def _prepared(number: str, data: bytes, vision: Vision) -> tuple[PreparedPicture, int]:
    """A picture, decoded and made ready, and how many pixels it had. Raises BadRequest."""
    try:
        # Not shrunk: the model's own way of doing that is part of what it was trained with.
        pixels = decode_picture(data, f"[img-{number}]", kept_side=MAX_INPUT_SIDE)
        return identified(vision.prepare(pixels)), pixels.shape[0] * pixels.shape[1]
    except PictureError as error:
        raise BadRequest(f"decode image: [img-{number}] {error}") from None
    except BadRequest as error:
        raise BadRequest(f"decode image: {error}") from None


def truncate(prompt: Prompt, limit: int, *, keep: int, allowed: bool) -> Prompt:
    """Drop the middle, so that the prompt and one token fit; a picture goes or stays as a whole.

    Args:
        prompt: one that is too long.
        limit: tokens that the row may hold.
        keep: tokens at the front that stay.
        allowed: whether anything may be dropped at all.

    Raises:
        PromptTooLong: it may not, or a picture at the end is too long by itself.
    """
    tokens, sight = prompt.tokens, prompt.sight
    room = limit - 1
    if not allowed or room < 1:
        raise PromptTooLong(len(tokens), limit)
    # As Ollama does, at least one token of the tail stays.
    keep = min(keep, room - 1)
    end = len(tokens) - (room - keep)
    if sight is not None:
        keep, end = sight.outside(keep, ahead=False), sight.outside(end, ahead=True)
        if end == len(tokens):
            raise PromptTooLong(len(tokens), limit)
    new = len(tokens) - (end - keep)
    logger.warning(
        "prompt truncated", extra={"fields": {"limit": limit, "prompt": len(tokens), "keep": keep, "new": new}}
    )
    rest = None if sight is None else sight.without(keep, end)
    return Prompt(tokens[:keep] + tokens[end:], rest if rest is not None and rest.pictures else None)
