"""Pictures in the classic dialect, in which Ollama's own runner knows only the fields: its parents show the last line.

Source: llm/server.go, v0.24.0 (the fields, the line buffer, the guard against loops).
"""

from collections.abc import Iterator
from typing import Final

from protocol import ollamarunner as wire
from runner.dialects.base import reason_of
from runner.dialects.pictures import image_request
from runner.engine.pictures import EncodedPicture
from runner.engine.types import ImageProgress, ImageQueued, ImageRequest, Picture
from runner.errors import BadRequest

MAX_LINE: Final = 500_000
"""The parent reads with a buffer of 512,000 bytes."""
MAX_NEWS: Final = 18
"""Beside the ten pictures of the largest request."""
STEPS_TOLD: Final = 14


def parse_image(body: wire.CompletionRequest) -> ImageRequest:
    """Translate a wire request for pictures.

    Raises:
        BadRequest: a field cannot be honoured.
    """
    for name, value in (("Grammar", body.grammar), ("Logprobs", body.logprobs)):
        if value:
            raise BadRequest(f"{name} cannot be honoured: the loaded model generates images, not text")
    return image_request(
        body.prompt,
        body.options,
        body,
        width=body.width,
        height=body.height,
        steps=body.steps,
        seed=body.seed,
        images=tuple(image.data for image in body.images),
    )


class OllamaRunnerPictureEncoder:
    """Lines of the classic dialect for pictures.

    A parent gives up without a word after 30 lines of equal content, and these all have none: besides the pictures it
    is told of at most MAX_NEWS steps and places in the queue, with the previews that come with them.
    """

    max_line = MAX_LINE

    def __init__(self) -> None:
        self._left = MAX_NEWS

    def queued(self, queued: ImageQueued) -> Iterator[bytes]:
        """A line of our own."""
        if self._left > STEPS_TOLD:
            self._left -= 1
            yield wire.StepLine(queue=queued.place).to_line()

    def progress(self, progress: ImageProgress, preview: bytes) -> Iterator[bytes]:
        """A line for each of STEPS_TOLD parts of the way."""
        step, total = progress.step, progress.total
        if self._left and step * STEPS_TOLD // total > (step - 1) * STEPS_TOLD // total:
            self._left -= 1
            yield wire.StepLine(step=step, total_steps=total, index=progress.index, preview=preview).to_line()

    def picture(self, picture: Picture, encoded: EncodedPicture, *, last: bool) -> bytes:
        """The picture, with all the figures."""
        return wire.PictureLine(
            done=last,
            seed=picture.request.seed,
            index=picture.index,
            format=encoded.format,
            width=picture.request.width,
            height=picture.request.height,
            prompt_eval_duration=picture.encode_ns,
            eval_count=picture.steps_computed,
            eval_duration=picture.denoise_ns,
            decode_duration=picture.decode_ns,
            queue_duration=picture.wait_ns,
            image=encoded.data,
        ).to_line()

    def error(self, error: Exception) -> bytes:
        """As for text."""
        return wire.ErrorLine(error=reason_of(error)).to_line()
