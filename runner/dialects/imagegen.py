"""The imagegen dialect: `runner --imagegen-engine`, spoken by Ollama v0.16 to v0.32.

The model is loaded before the process listens, so an answer to GET /health means "ready".
"""

from collections.abc import Iterable, Iterator
from typing import Final

from aiohttp import web

from protocol.gojson import TextLine
from protocol.imagegen import (
    CompletionLine,
    CompletionRequest,
    HealthResponse,
    PictureDoneLine,
    PictureLine,
    QueueLine,
    StepLine,
    TokenizeRequest,
    TokenizeResponse,
)
from runner.dialects.base import (
    done_reason,
    json_response,
    read_model,
    reason_of,
    refuse_image_fields,
    require_ready,
    split_lines,
    text_request,
)
from runner.dialects.embedding import answer_embedding
from runner.dialects.formats import output_format
from runner.dialects.pictures import PictureAnswer, image_request
from runner.dialects.streaming import TextAnswer, stream
from runner.engine.loop import EngineLoop
from runner.engine.pictures import EncodedPicture
from runner.engine.types import (
    ImageProgress,
    ImageQueued,
    ImageRequest,
    InputImage,
    Picture,
    TextChunk,
    TextDone,
    TextRequest,
)
from runner.errors import BadRequest

MAX_LINE: Final = 16 * 1024 * 1024
"""The parent's line buffer."""
CONTENT_TYPE: Final = "application/x-ndjson"


class ImagegenDialect:
    """Routes of the imagegen dialect."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def routes(self) -> Iterable[web.RouteDef]:
        """The routes to serve."""
        return (
            web.get("/health", self._health),
            web.post("/completion", self._completion),
            web.post("/tokenize", self._tokenize),
            web.post("/embedding", self._embedding),
        )

    async def close(self) -> None:
        """Nothing runs in the background."""

    async def _health(self, _request: web.Request) -> web.Response:
        require_ready(self._loop)
        status = self._loop.status
        return json_response(
            HealthResponse(
                status="ok",
                step=status.step,
                total=status.total_steps,
                queue=status.waiting if status.makes_pictures else 0,
            )
        )

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await read_model(request, CompletionRequest)
        if self._loop.status.makes_pictures:
            pictures = PictureAnswer(ImagegenPictureEncoder())
            return await stream(request, self._loop, parse_image(body), pictures, CONTENT_TYPE)
        return await stream(request, self._loop, parse(body), TextAnswer(ImagegenEncoder()), CONTENT_TYPE)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await read_model(request, TokenizeRequest)
        tokens = await self._loop.tokenize(body.content, add_bos=False)
        return json_response(TokenizeResponse(tokens=tuple(tokens)))

    async def _embedding(self, request: web.Request) -> web.Response:
        return await answer_embedding(request, self._loop)


def parse_image(body: CompletionRequest) -> ImageRequest:
    """Translate a wire request for pictures.

    Raises:
        BadRequest: a field cannot be honoured.
    """
    if body.grammar:
        raise BadRequest("grammar cannot be honoured: the loaded model generates images, not text")
    return image_request(
        body.prompt,
        body.options,
        body,
        width=body.width,
        height=body.height,
        steps=body.steps,
        seed=body.seed,
        images=body.images,
    )


def parse(body: CompletionRequest) -> TextRequest:
    """Translate a wire request for text.

    Raises:
        BadRequest: an option has an impossible value.
        NotImplementedHere: it asks for something this runner cannot do.
    """
    wanted = output_format(grammar=body.grammar, schema=body.format)
    # At the top, format is the text's own.
    beside = body.model_copy(update={"format": None})
    refuse_image_fields(body.options, beside, width=body.width, height=body.height, steps=body.steps)
    seed = body.seed if body.seed > 0 else None
    options = body.options
    if options is not None and "seed" not in options.model_fields_set:
        # This dialect's options have no seed: here an absent one is not 0 but the request's own, or a random one.
        options = options.model_copy(update={"seed": -1})
    prompt, images = _referring(body.prompt, body.images)
    return text_request(prompt, options, seed=seed, wanted=wanted, images=images)


def _referring(prompt: str, files: tuple[bytes, ...]) -> tuple[str, tuple[InputImage, ...]]:
    """A prompt that refers to pictures, and these under the numbers that it uses.

    In this dialect they have no ids. Its parents write `[img-0]` and so on in their order where they render a chat; a
    prompt in which no picture is referred to has all of them in front of it.
    """
    tags = [f"[img-{number}]" for number in range(len(files))]
    if not any(tag in prompt for tag in tags):
        prompt = "".join(tags) + prompt
    return prompt, tuple(InputImage(number, data) for number, data in enumerate(files))


class ImagegenEncoder:
    """Lines of the imagegen dialect."""

    def chunk(self, chunk: TextChunk) -> Iterator[bytes]:
        """The dialect has no place for log-probabilities."""
        return split_lines(chunk.text, (), lambda text, _: _plain_line(text), MAX_LINE)

    def done(self, done: TextDone) -> Iterator[bytes]:
        """The counts, and why it ended in words and as a number."""
        yield CompletionLine(
            done=True,
            done_reason=done_reason(done.reason),
            stop_reason=done.reason.value,
            prompt_eval_count=done.prompt_tokens,
            prompt_eval_duration=done.prompt_ns,
            eval_count=done.eval_tokens,
            eval_duration=done.eval_ns,
        ).to_line()

    def error(self, error: Exception) -> bytes:
        """The dialect has no error field: the text itself says it."""
        return _error_line(error)


class ImagegenPictureEncoder:
    """Lines of the imagegen dialect for pictures."""

    max_line = MAX_LINE

    def queued(self, queued: ImageQueued) -> Iterator[bytes]:
        """A line of our own."""
        yield QueueLine(queue=queued.place).to_line()

    def progress(self, progress: ImageProgress, preview: bytes) -> Iterator[bytes]:
        """A line a step."""
        yield StepLine(step=progress.step, total=progress.total, index=progress.index, preview=preview).to_line()

    def picture(self, picture: Picture, encoded: EncodedPicture, *, last: bool) -> bytes:
        """The picture; the last one with all the figures."""
        seed, index = picture.request.seed, picture.index
        if not last:
            return PictureLine(index=index, seed=seed, format=encoded.format, image=encoded.data).to_line()
        return PictureDoneLine(
            seed=seed,
            index=index,
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
        return _error_line(error)


def _error_line(error: Exception) -> bytes:
    return CompletionLine(content=f"error: {reason_of(error)}", done=True).to_line()


_plain_line: Final = TextLine(CompletionLine(), "content")
