"""The imagegen dialect: `runner --imagegen-engine`, spoken by Ollama v0.16 to v0.32.

The model is loaded before the process listens, so an answer to GET /health means "ready".
"""

from collections.abc import Iterable, Iterator
from typing import Final

from aiohttp import web

from protocol.imagegen import CompletionLine, CompletionRequest, HealthResponse, TokenizeRequest, TokenizeResponse
from runner.dialects.base import (
    done_reason,
    json_response,
    read_model,
    reason_of,
    refuse,
    refuse_image_fields,
    require_ready,
    split_lines,
    stream,
    text_request,
)
from runner.engine.loop import EngineLoop
from runner.engine.types import TextChunk, TextDone, TextRequest, TokenLogprob
from runner.errors import NotImplementedHere

MAX_LINE: Final = 16 * 1024 * 1024
"""The parent's line buffer."""


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
        return json_response(HealthResponse(status="ok"))

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        wanted = parse(await read_model(request, CompletionRequest))
        return await stream(request, self._loop, wanted, ImagegenEncoder(), "application/x-ndjson")

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await read_model(request, TokenizeRequest)
        tokens = await self._loop.tokenize(body.content, add_bos=False)
        return json_response(TokenizeResponse(tokens=tuple(tokens)))

    async def _embedding(self, _request: web.Request) -> web.Response:
        raise NotImplementedHere("this model does not support embeddings")


def parse(body: CompletionRequest) -> TextRequest:
    """Translate a wire request.

    Raises:
        BadRequest: an option has an impossible value.
        NotImplementedHere: it asks for something this runner cannot do.
    """
    refuse_image_fields(width=body.width, height=body.height, steps=body.steps)
    if body.images:
        raise refuse("images", "the loaded model takes text only")
    seed = body.seed if body.seed > 0 else None
    options = body.options
    if options is not None and "seed" not in options.model_fields_set:
        # This dialect's options have no seed: here an absent one is not 0 but the request's own, or a random one.
        options = options.model_copy(update={"seed": -1})
    return text_request(body.prompt, options, seed=seed)


class ImagegenEncoder:
    """Lines of the imagegen dialect."""

    def chunk(self, chunk: TextChunk) -> Iterator[bytes]:
        """The dialect has no place for log-probabilities."""
        return split_lines(chunk.text, (), _content_line, MAX_LINE)

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
        return CompletionLine(content=f"error: {reason_of(error)}", done=True).to_line()


def _content_line(text: str, _logprobs: tuple[TokenLogprob, ...]) -> bytes:
    return CompletionLine(content=text).to_line()
