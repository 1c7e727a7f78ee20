"""What the dialects share of pictures: from a wire request to an `ImageRequest`, from the engine's outputs to lines.

Pictures are encoded here, in a worker thread: neither the event loop nor the executor's thread waits for a PNG.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Protocol, TypeVar, assert_never

from protocol.options import Options, PictureFields
from runner.engine.pictures import EncodedPicture, Note, encode_picture, encode_preview
from runner.engine.types import (
    EmbeddingDone,
    Failed,
    ImageDone,
    ImageMade,
    ImageProgress,
    ImageQueued,
    ImageRequest,
    Output,
    Picture,
    TextChunk,
    TextDone,
)
from runner.errors import BadRequest

PROGRAM: Final = "ollama-mlx-runner"
LINE_REST: Final = 4096
"""Bytes of a line that are not the picture, at most."""

UNASKED: Final[Mapping[str, tuple[float, ...]]] = {
    "temperature": (0.8,),
    "top_k": (40,),
    "top_p": (0.9, 1.0),
    "min_p": (),
    "typical_p": (1.0,),
    "repeat_last_n": (64,),
    "repeat_penalty": (1.0, 1.1),
    "presence_penalty": (),
    "frequency_penalty": (),
    "num_predict": (-1, -2),
}
"""Options for text alone, with the values that parents merge into every request; 0 is as good as absent.

The other options (num_ctx, num_keep, num_batch, …) cannot change a picture and come with every such object.
"""

Value = TypeVar("Value")


def image_request(
    prompt: str,
    options: Options | None,
    beside: PictureFields,
    *,
    width: int,
    height: int,
    steps: int,
    seed: int,
    images: tuple[bytes, ...],
) -> ImageRequest:
    """Translate a wire request. Zeros mean the default, and what stands beside the options goes before them.

    Raises:
        BadRequest: a field cannot be honoured; the message names it.
    """
    _refuse_text_options(options)
    for name, value in (("width", width), ("height", height), ("steps", steps)):
        if value < 0:
            raise BadRequest(f"{name} must not be negative, but is {value}")
    within = options or PictureFields()
    if seed <= 0 and options is not None:
        seed = options.seed
    return ImageRequest(
        prompt=prompt,
        width=width or None,
        height=height or None,
        steps=steps or None,
        seed=seed if seed > 0 else None,
        guidance=_either(beside.guidance, within.guidance),
        negative_prompt=_either(beside.negative_prompt, within.negative_prompt) or "",
        images=images,
        strength=_either(beside.strength, within.strength),
        preview=_either(beside.preview, within.preview) or 0,
        format=_format(_either(beside.format, within.format)),
        count=_either(beside.n, within.n) or 1,
        step_cache=_either(beside.step_cache, within.step_cache) or 0.0,
    )


def _either(first: Value | None, second: Value | None) -> Value | None:
    return second if first is None else first


def _format(value: object) -> str:
    if value is None or value == "":
        return "png"
    if not isinstance(value, str):
        raise BadRequest("format must be the name of a picture format: png, jpeg or webp")
    return value


def _refuse_text_options(options: Options | None) -> None:
    if options is None:
        return
    for name, unasked in UNASKED.items():
        value = getattr(options, name)
        if value and not any(math.isclose(value, usual, rel_tol=1e-6) for usual in unasked):
            raise BadRequest(f"{name} cannot be honoured: the loaded model generates images, not text")
    if any(options.stop):
        raise BadRequest("stop cannot be honoured: the loaded model generates images, not text")


class PictureEncoder(Protocol):
    """Writes an image request's outputs as lines, newline included."""

    @property
    def max_line(self) -> int:
        """Bytes of a line that the parent can read."""
        ...

    def queued(self, queued: ImageQueued) -> Iterable[bytes]:
        """The lines for a place in the queue."""
        ...

    def progress(self, progress: ImageProgress, preview: bytes) -> Iterable[bytes]:
        """The lines for a step; the preview is a JPEG, or empty."""
        ...

    def picture(self, picture: Picture, encoded: EncodedPicture, *, last: bool) -> bytes:
        """The line for a picture."""
        ...

    def error(self, error: Exception) -> bytes:
        """The last line of an answer that failed."""
        ...


class PictureAnswer:
    """An answer in pictures, by a dialect's encoder."""

    waits = True

    def __init__(self, encoder: PictureEncoder) -> None:
        self._encoder = encoder

    async def lines(self, output: Output) -> Iterable[bytes]:
        """The encoder's. Raises GenerationError: a picture is too large for a line."""
        match output:
            case ImageQueued():
                return self._encoder.queued(output)
            case ImageProgress(preview=None):
                return self._encoder.progress(output, b"")
            case ImageProgress(preview=pixels):
                assert pixels is not None
                return self._encoder.progress(output, await asyncio.to_thread(encode_preview, pixels))
            case ImageMade() | ImageDone():
                return (await asyncio.to_thread(self._picture, output.picture, last=output.is_last),)
            case TextChunk() | TextDone() | EmbeddingDone() | Failed():
                raise AssertionError(f"an ImageRequest has no {type(output).__name__}")
            case _:
                assert_never(output)

    def error(self, error: Exception) -> bytes:
        """The encoder's."""
        return self._encoder.error(error)

    def _picture(self, picture: Picture, *, last: bool) -> bytes:
        # Base64 makes four bytes of three.
        max_bytes = (self._encoder.max_line - LINE_REST) // 4 * 3
        encoded = encode_picture(picture.pixels, picture.format, note_of(picture), max_bytes)
        return self._encoder.picture(picture, encoded, last=last)


def note_of(picture: Picture) -> Note:
    """What the file says of the picture."""
    asked = picture.request
    return Note(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        steps=asked.steps,
        guidance=asked.guidance,
        seed=asked.seed,
        width=asked.width,
        height=asked.height,
        model=picture.model,
        software=software(),
        strength=asked.strength if picture.noised else None,
        step_cache=asked.step_cache,
    )


@cache
def software() -> str:
    """This program and its version."""
    try:
        return f"{PROGRAM} {version(PROGRAM)}"
    except PackageNotFoundError:
        return PROGRAM
