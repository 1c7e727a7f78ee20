"""Embeddings on the wire: one route, the same in all dialects."""

from typing import Final

from aiohttp import web

from protocol.embedding import EmbeddingRequest as WireRequest
from protocol.embedding import embedding_line
from protocol.options import Options
from runner.dialects.base import read_model, reason_of, refuse, refuse_image_fields
from runner.engine.loop import EngineLoop
from runner.engine.types import EmbeddingDone, EmbeddingRequest, Failed, Output
from runner.errors import BadRequest, GenerationError, RunnerError

CONTENT_TYPE: Final = "application/json"
MAX_TEXTS: Final = 2048
"""Of one request: all their vectors are held until the last is there."""


async def answer_embedding(request: web.Request, loop: EngineLoop) -> web.Response:
    """Answer POST /embedding.

    The handler's task is cancelled when the client goes away; leaving the loop's context cancels the request there.

    Raises:
        RunnerError: the request cannot be served, or failed.
    """
    body = await read_model(request, WireRequest)
    wanted = parse(body)
    async with loop.submit(wanted) as outputs:
        done = _done(await anext(outputs, None))
    line = embedding_line(done.vectors, done.tokens, several=isinstance(body.content, list))
    return web.Response(body=line, content_type=CONTENT_TYPE)


def parse(body: WireRequest) -> EmbeddingRequest:
    """Translate a wire request.

    Raises:
        BadRequest: a value is impossible.
        NotImplementedHere: it asks for something this runner does not do.
    """
    if body.truncate:
        raise refuse("truncate", "a parent that is told that a text is too long cuts it and asks again")
    if body.dimensions < 0:
        raise BadRequest(f"dimensions must not be negative, but is {body.dimensions}")
    refuse_image_fields(body.options)
    return EmbeddingRequest(_texts(body.content), body.dimensions or None, _num_ctx(body.options))


def _texts(content: object) -> tuple[str, ...]:
    """Half a surrogate pair becomes U+FFFD, as everywhere on the wire."""
    texts = content if isinstance(content, list) else ["" if content is None else content]
    if len(texts) > MAX_TEXTS:
        raise BadRequest(f"content has {len(texts)} texts; at most {MAX_TEXTS} may come at once")
    if not texts:
        raise BadRequest("content has no texts")
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest("content must be a text or a list of texts")
    return tuple(str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)


def _num_ctx(options: Options | None) -> int | None:
    if options is None:
        return None
    if options.num_ctx < 0:
        raise BadRequest(f"num_ctx must not be negative, but is {options.num_ctx}")
    return options.num_ctx or None


def _done(output: Output | None) -> EmbeddingDone:
    """The answer among a request's outputs, of which there is one. Raises what a failure tells."""
    if isinstance(output, Failed):
        if isinstance(output.error, RunnerError):
            raise output.error
        raise GenerationError(reason_of(output.error))
    if not isinstance(output, EmbeddingDone):
        raise GenerationError("the engine ended the request without an answer")
    return output
