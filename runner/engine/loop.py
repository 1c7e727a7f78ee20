"""EngineLoop: the event loop's side of the one crossing between two threads.

Owns the requests in flight and their output queues; refuses to know what an array, a socket or a dialect is. Only
`tick(added, cancelled) -> outputs` runs in the MLX thread.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias

from runner.engine.mlx_thread import MLXThread
from runner.engine.types import Engine, EngineStatus, Output, Request

Progress: TypeAlias = Callable[[float], None]
BuildEngine: TypeAlias = Callable[[Progress], Engine]
"""Builds the engine in the MLX thread; calls its argument with 0 to 1, which may raise to abandon the load."""


class EngineLoop:
    """Drives one engine. All methods belong to the event loop's thread."""

    def __init__(self, thread: MLXThread) -> None:
        raise NotImplementedError

    @property
    def status(self) -> EngineStatus:
        """The last snapshot; never waits."""
        raise NotImplementedError

    async def load(self, build: BuildEngine) -> None:
        """Build the engine in the MLX thread and start serving. Raises AlreadyLoaded, or what `build` raised (status ERROR)."""
        raise NotImplementedError

    async def unload(self) -> None:
        """End all requests with NotReady, free the engine, go back to LAUNCHED."""
        raise NotImplementedError

    def submit(self, request: Request) -> AbstractAsyncContextManager[AsyncIterator[Output]]:
        """Admit a request: `async with loop.submit(request) as outputs: async for output in outputs`.

        Entering prepares it (off the event loop) and queues it; leaving early, by whatever way, cancels it.

        Raises:
            BadRequest: on entering; nothing was queued.
            NotReady: on entering; no engine.
            Busy: on entering; the queue is full.
        """
        raise NotImplementedError

    async def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of `text`. Raises NotReady, BadRequest."""
        raise NotImplementedError

    async def close(self, grace_s: float) -> None:
        """Stop admitting, give running requests `grace_s`, cancel the rest, unload. Idempotent."""
        raise NotImplementedError
