"""Streaming an answer: what the engine says of a request, line by line, to its end or the client's.

Before the first header an error is a status with one line of plain text (the application's middleware writes it);
afterwards it is the dialect's own last line.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from aiohttp import web

from runner.dialects.base import TIMEOUTS, reason_of
from runner.engine.loop import EngineLoop
from runner.engine.types import Failed, Output, Request, TextChunk, TextDone
from runner.errors import GenerationError, RunnerError

logger = logging.getLogger(__name__)

CHUNK_FRAME = 64
"""Bytes that HTTP's chunked encoding may add to a line, generously."""


class Encoder(Protocol):
    """Writes a text request's outputs as lines, newline included; may hold something back until the next output."""

    def chunk(self, chunk: TextChunk) -> Iterable[bytes]:
        """The lines for a piece of text."""
        ...

    def done(self, done: TextDone) -> Iterable[bytes]:
        """The last lines of an answer."""
        ...

    def error(self, error: Exception) -> bytes:
        """The last line of an answer that failed."""
        ...


class Answer(Protocol):
    """How one request's outputs become lines."""

    @property
    def waits(self) -> bool:
        """No header is sent before the first output, so that what fails until then is a status."""
        ...

    async def lines(self, output: Output) -> Iterable[bytes]:
        """The lines for an output that is no failure. Raises RunnerError."""
        ...

    def error(self, error: Exception) -> bytes:
        """The last line of an answer that failed."""
        ...


class TextAnswer:
    """An answer in text, by a dialect's encoder."""

    waits = False

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    async def lines(self, output: Output) -> Iterable[bytes]:
        """The encoder's."""
        if isinstance(output, TextChunk):
            return self._encoder.chunk(output) if output.text or output.logprobs else ()
        assert isinstance(output, TextDone)  # a TextRequest has no other outputs
        return self._encoder.done(output)

    def error(self, error: Exception) -> bytes:
        """The encoder's."""
        return self._encoder.error(error)


async def stream(
    request: web.Request, loop: EngineLoop, wanted: Request, answer: Answer, content_type: str
) -> web.StreamResponse:
    """Generate and write the answer line by line.

    The handler's task is cancelled when the client goes away; leaving the loop's context cancels the request there.

    Raises:
        RunnerError: the request was not admitted, or failed before anything was said; no header was sent.
    """
    async with loop.submit(wanted) as outputs:
        first = await _first(outputs) if answer.waits else None
        response = web.StreamResponse(headers={"Content-Type": content_type})
        try:
            await response.prepare(request)
            failure = await _write_all(request, response, answer, first, outputs)
            if failure is not None:
                logger.warning("request failed", extra={"fields": {"error": reason_of(failure)}})
                await _write(request, response, answer.error(failure))
        except ConnectionError as error:
            logger.info("client went away", extra={"fields": {"reason": str(error)}})
        return response


async def _first(outputs: AsyncIterator[Output]) -> Output | None:
    """The first output. Raises what a failure tells, if it is one."""
    first = await anext(outputs, None)
    if not isinstance(first, Failed):
        return first
    if isinstance(first.error, RunnerError):
        raise first.error
    raise GenerationError(reason_of(first.error))


async def _write_all(
    request: web.Request,
    response: web.StreamResponse,
    answer: Answer,
    first: Output | None,
    outputs: AsyncIterator[Output],
) -> Exception | None:
    """Write the outputs to the last; what failed, if anything did.

    Raises:
        ConnectionError: the client is gone or does not read.
    """
    try:
        output = first or await anext(outputs, None)
        while output is not None:
            if isinstance(output, Failed):
                return output.error
            for line in await answer.lines(output):
                await _write(request, response, line)
            if output.is_last:
                return None
            output = await anext(outputs, None)
    except RunnerError as error:
        return error
    return GenerationError("the engine ended the request without an answer")


async def _write(request: web.Request, response: web.StreamResponse, line: bytes) -> None:
    """Write a line, waiting for a slow reader but not for one that never reads.

    Raises:
        ConnectionError: the client is gone or does not read.
    """
    if _has_room(request.transport, len(line)):
        await response.write(line)
        return
    limit_s = request.app[TIMEOUTS].write_s
    try:
        async with asyncio.timeout(limit_s):
            await response.write(line)
    except TimeoutError as error:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionAbortedError(f"the client has read nothing for {limit_s:g} s") from error


def _has_room(transport: asyncio.Transport | None, size: int) -> bool:
    """Whether so many bytes can be written without any waiting, and so without a limit to it."""
    if transport is None:
        return False
    _, high = transport.get_write_buffer_limits()
    return transport.get_write_buffer_size() + size + CHUNK_FRAME < high
