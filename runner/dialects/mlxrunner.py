"""The mlx dialect: `runner --mlx-engine`, spoken by Ollama v0.17 to today.

The model is loaded before the process listens, so 200 for GET /v1/status means "ready". The paths /health, /load and
/completion, which Ollama's own runner redirects, are answered directly.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from aiohttp import web

from protocol.gojson import TextLine, WireError, write_line
from protocol.gojson import parse as parse_json
from protocol.mlxrunner import (
    CompletionRequest,
    ContentLine,
    DoneLine,
    ErrorLine,
    Media,
    ModelsResponse,
    StatusError,
    StatusResponse,
)
from runner.dialects.base import (
    done_reason,
    json_response,
    read_body,
    reason_of,
    refuse,
    refuse_image_fields,
    require_ready,
    split_lines,
    text_request,
    wire_logprobs,
)
from runner.dialects.embedding import answer_embedding
from runner.dialects.formats import output_format
from runner.dialects.streaming import TextAnswer, stream
from runner.engine.loop import EngineLoop
from runner.engine.types import InputImage, TextChunk, TextDone, TextRequest, TokenLogprob
from runner.errors import BadRequest, NotImplementedHere, status_of

MAX_LINE: Final = 60 * 1024
"""The parent reads with bufio.Scanner's default buffer of 64 KiB."""


class MLXDialect:
    """Routes of the mlx dialect."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def routes(self) -> Iterable[web.RouteDef]:
        """The routes to serve."""
        return (
            web.get("/v1/status", self._status),
            web.get("/health", self._status),
            web.get("/v1/models", self._models),
            web.post("/v1/models", self._models),
            web.post("/load", self._models),
            web.post("/v1/completions", self._completion),
            web.post("/completion", self._completion),
            web.post("/v1/tokenize", self._tokenize),
            web.post("/embedding", self._embedding),
        )

    async def close(self) -> None:
        """Nothing runs in the background."""

    async def _status(self, _request: web.Request) -> web.Response:
        require_ready(self._loop)
        status = self._loop.status
        return json_response(
            StatusResponse(progress=100, context_length=status.context_length, memory=status.memory_bytes)
        )

    async def _models(self, _request: web.Request) -> web.Response:
        require_ready(self._loop)
        return json_response(ModelsResponse())

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request)
        if self._loop.status.makes_pictures:
            raise NotImplementedHere(
                "the loaded model generates images, for which the mlx protocol has no answers; start the runner with "
                "--imagegen-engine"
            )
        return await stream(request, self._loop, parse(body), TextAnswer(MLXEncoder()), "application/jsonl")

    async def _tokenize(self, request: web.Request) -> web.Response:
        text = (await read_body(request)).decode("utf-8", errors="replace")
        tokens = await self._loop.tokenize(text, add_bos=True)
        return web.Response(body=write_line(list(tokens)), content_type="application/json")

    async def _embedding(self, request: web.Request) -> web.Response:
        return await answer_embedding(request, self._loop)


def parse(body: bytes) -> TextRequest:
    """Translate a wire request.

    Raises:
        BadRequest: it is not JSON, a field has the wrong type, or an option has an impossible value.
        NotImplementedHere: it asks for something this runner cannot do.
    """
    try:
        raw = parse_json(body)
        wire = CompletionRequest.from_value({} if raw is None else raw)
    except WireError as error:
        raise BadRequest(f"bad request: {error}") from error
    images = _images((*wire.media, *wire.images))
    wanted = output_format(grammar=wire.grammar, schema=wire.format)
    options = wire.options
    refuse_image_fields(options)
    if options is not None and isinstance(raw, dict) and "options" in raw and "seed" not in options.model_fields_set:
        # Parents before v0.22 write `options` in lower case and never send a seed: absent is random there. Later ones
        # write `Options` and leave out a seed only when it is 0.
        options = options.model_copy(update={"seed": -1})
    return text_request(
        wire.prompt,
        options,
        logprobs=wire.logprobs,
        top_logprobs=wire.top_logprobs,
        wanted=wanted,
        images=images,
    )


def _images(media: tuple[Media, ...]) -> tuple[InputImage, ...]:
    """The pictures among the media; parents leave their kind out or call it `image`.

    Raises:
        NotImplementedHere: there is something else among them.
    """
    for each in media:
        if each.kind.lower() not in ("", "image"):
            raise refuse(f"Media of kind {each.kind[:32]}", "this runner takes text and images")
    return tuple(InputImage(each.id, each.data) for each in media)


class MLXEncoder:
    """Lines of the mlx dialect."""

    def chunk(self, chunk: TextChunk) -> Iterator[bytes]:
        """A line, or several if it is too long for the parent."""
        return split_lines(chunk.text, chunk.logprobs, _content_line, MAX_LINE)

    def done(self, done: TextDone) -> Iterator[bytes]:
        """The counts, in both spellings."""
        reason = done_reason(done.reason)
        yield DoneLine(
            done=True,
            done_reason=reason,
            prompt_eval_count=done.prompt_tokens,
            prompt_eval_cached_count=done.cached_tokens,
            prompt_eval_duration=done.prompt_ns,
            eval_count=done.eval_tokens,
            eval_duration=done.eval_ns,
            snake_done_reason=reason,
            snake_prompt_eval_count=done.prompt_tokens,
            snake_prompt_eval_duration=done.prompt_ns,
            snake_eval_count=done.eval_tokens,
            snake_eval_duration=done.eval_ns,
        ).to_line()

    def error(self, error: Exception) -> bytes:
        """The parent answers its user with this status and message."""
        return ErrorLine(error=StatusError(status_code=status_of(error), error=reason_of(error))).to_line()


_plain_line: Final = TextLine(ContentLine(), "content")


def _content_line(text: str, logprobs: tuple[TokenLogprob, ...]) -> bytes:
    if not logprobs:
        return _plain_line(text)
    return ContentLine(content=text, logprobs=wire_logprobs(logprobs)).to_line()
