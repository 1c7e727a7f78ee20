"""A scripted engine loop and loader with the real interfaces, and a server on a real socket with the real options."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
from aiohttp import web

from runner.app import SERVER_OPTIONS, make_app
from runner.config import DialectName, RunnerConfig
from runner.dialects.base import Timeouts
from runner.engine.load import DeviceMemory, LoadOptions, MemoryPlan
from runner.engine.types import (
    EmbeddingRequest,
    EngineState,
    EngineStatus,
    FinishReason,
    TextChunk,
    TextDone,
    TextRequest,
)
from runner.errors import AlreadyLoaded, NotReady

DONE = TextDone(
    id=1,
    reason=FinishReason.STOP,
    prompt_tokens=7,
    cached_tokens=2,
    prompt_ns=11,
    eval_tokens=3,
    eval_ns=13,
    stop_token=True,
)
READY = EngineStatus(state=EngineState.READY, context_length=8192, memory_bytes=123)


def chunk(text, logprobs=()):
    return TextChunk(id=1, text=text, logprobs=tuple(logprobs))


async def say(request):
    """The default script."""
    yield chunk("Hel")
    yield chunk("lo")
    yield DONE


class ScriptedLoop:
    """EngineLoop's interface; answers by `script`, an async generator function of the request."""

    def __init__(self, script=say, status=READY):
        self.script = script
        self.status = status
        self.requests: list[TextRequest] = []
        self.tokenized: list[tuple[str, bool]] = []
        self.refusal: Exception | None = None
        self.cancelled = asyncio.Event()
        self.left: asyncio.Queue[str] = asyncio.Queue()
        """The prompts, or first texts, of the requests that are over, in order."""
        self.may_load = asyncio.Event()
        self.load_failure: Exception | None = None

    async def load(self, build):
        if self.status.state in (EngineState.LOADING, EngineState.READY):
            raise AlreadyLoaded
        self.status = EngineStatus(state=EngineState.LOADING, progress=0.5)
        await self.may_load.wait()
        if self.load_failure is not None:
            self.status = EngineStatus(state=EngineState.ERROR, error=str(self.load_failure))
            raise self.load_failure
        build(lambda progress: None)
        self.status = READY

    async def unload(self):
        self.status = EngineStatus()

    @asynccontextmanager
    async def submit(self, request):
        if self.status.state is not EngineState.READY:
            raise NotReady("no model is loaded")
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        try:
            yield self.script(request)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.left.put_nowait(request.texts[0] if isinstance(request, EmbeddingRequest) else request.prompt)

    async def tokenize(self, text, *, add_bos):
        self.tokenized.append((text, add_bos))
        return [1, *text.encode()] if add_bos else list(text.encode())


GIB = 2**30


@dataclass
class ScriptedLoader:
    """ModelLoader's interface."""

    memory: MemoryPlan = field(
        default_factory=lambda: MemoryPlan(
            input_weights=5, device=DeviceMemory("0", "cpu", "A CPU", (10, 11, 12), (20, 21), 30), available=GIB
        )
    )
    failure: Exception | None = None
    planned: list[tuple[str, LoadOptions]] = field(default_factory=list)
    built: int = 0

    def plan(self, reference, options):
        if self.failure is not None:
            raise self.failure
        self.planned.append((reference, options))
        return self.memory

    def builder(self, reference, options):
        self.plan(reference, options)
        self.built += 1
        return lambda progress: None

    def shrink(self):
        self.memory = replace(self.memory, available=1)


@dataclass(frozen=True)
class Served:
    """A dialect on a socket."""

    loop: ScriptedLoop
    loader: ScriptedLoader
    client: aiohttp.ClientSession
    port: int

    async def post(self, path, **kwargs):
        """Status and body of a POST."""
        async with self.client.post(path, **kwargs) as response:
            return response.status, await response.read()

    async def get(self, path):
        async with self.client.get(path) as response:
            return response.status, await response.read()


@asynccontextmanager
async def serve(
    dialect: DialectName,
    loop: ScriptedLoop | None = None,
    loader: ScriptedLoader | None = None,
    *,
    timeouts: Timeouts | None = None,
    model: str | None = "the-model",
    check_memory: bool = True,
    send_buffer: int | None = None,
    **options,
) -> AsyncIterator[Served]:
    loop, loader = loop or ScriptedLoop(), loader or ScriptedLoader()
    config = RunnerConfig(dialect=dialect, model=model, port=0, store=Path("store"), check_memory=check_memory)
    app = make_app(config, loop, loader, timeouts=timeouts)
    server = web.AppRunner(app, **{**SERVER_OPTIONS, **options})
    await server.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        # Accepted connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = listener.getsockname()[1]
    await web.SockSite(server, listener).start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            yield Served(loop, loader, client, port)
    finally:
        await server.cleanup()
