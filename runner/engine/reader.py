"""Reader: the queue between one request's row and whoever reads it. Thread: the event loop's."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from runner.engine.types import Output, TextChunk


@dataclass(slots=True)
class Reader:
    """The queue between one request's row and whoever reads it."""

    pending: deque[Output] = field(default_factory=deque)
    ended: bool = False
    waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        """Hand over an output."""
        self.pending.append(output)
        self.ended = output.is_last
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        while not self.pending:
            if self.ended:
                raise StopAsyncIteration
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        output = self.pending.popleft()
        if isinstance(output, TextChunk) and self.pending and isinstance(self.pending[0], TextChunk):
            return self._merged(output)
        return output

    def _merged(self, first: TextChunk) -> TextChunk:
        """One chunk of all that have come while nobody read."""
        chunks = [first]
        while self.pending and isinstance(following := self.pending[0], TextChunk):
            chunks.append(following)
            self.pending.popleft()
        logprobs = tuple(itertools.chain.from_iterable(chunk.logprobs for chunk in chunks))
        return TextChunk(first.id, "".join(chunk.text for chunk in chunks), logprobs)
