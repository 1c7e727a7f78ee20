"""Requests served by an engine on the fake executor, with and without the loop around it."""

import asyncio
from pathlib import Path

from models.executors.base import Executor, PictureEncoder
from models.vision import Vision
from runner.engine.eye import Eye
from runner.engine.loop import EngineLoop
from runner.engine.picture_cache import PictureCache
from runner.engine.text import TextEngine
from runner.engine.types import Failed, Output, RequestId, SamplingParams, TextChunk, TextDone, TextRequest
from tests.fakes import ByteTokenizer, FakeExecutor
from tests.fakes_vision import FakeEncoder
from tests.parity.executors import load

GREEDY = SamplingParams(temperature=0)
LONG = "la " * 60
"""A prompt of a dozen chunks."""
ENDLESS = "go on " * 1000
"""A script that no test hears to its end."""


class Answer:
    """What came of one request."""

    def __init__(self, outputs: list[Output]) -> None:
        assert outputs, "no output at all"
        *chunks, self.end = outputs
        assert isinstance(self.end, TextDone | Failed)
        assert all(isinstance(chunk, TextChunk) and (chunk.text or chunk.logprobs) for chunk in chunks)
        self.chunks = [chunk for chunk in chunks if isinstance(chunk, TextChunk)]
        self.pieces = [chunk.text for chunk in self.chunks]
        self.text = "".join(self.pieces)
        self.logprobs = [logprob for chunk in self.chunks for logprob in chunk.logprobs]

    @property
    def done(self) -> TextDone:
        assert isinstance(self.end, TextDone), self.end
        return self.end

    @property
    def error(self) -> Exception:
        assert isinstance(self.end, Failed), self.end
        return self.end.error


def make_engine(executor: FakeExecutor, **options) -> TextEngine:
    adds_bos = options.pop("adds_bos", False)
    settings = {"context_length": 256, "parallel": 4, "prefill_chunk": 16} | options
    return TextEngine(executor, ByteTokenizer(adds_bos=adds_bos), **settings)


def seeing(vision: Vision, encoder: PictureEncoder | None = None, *, cache_bytes: int = 1 << 20) -> Eye:
    """An eye on a tower in miniature."""
    return Eye(vision, encoder or FakeEncoder(deep=vision.tower.deep), PictureCache(cache_bytes))


def real_executor(model: Path, kind: str, **options) -> Executor:
    """A checkpoint of tiny weights on an executor of that kind; "mlx ahead" reads a step when the next is begun."""
    executor = load(model, kind.removesuffix(" ahead"), **options)
    if kind.endswith(" ahead"):
        executor.depth = 1
    return executor


def admit(engine: TextEngine, number: RequestId, request: TextRequest) -> None:
    """Prepare a request to the end, and queue it."""
    prepared = engine.prepare(request)
    if (completion := engine.completion(prepared)) is not None:
        completion()
    engine.add(number, prepared)


def to_the_end(engine: TextEngine) -> list[Output]:
    """Tick until nobody is left."""
    outputs = []
    while not engine.idle:
        outputs += engine.step()
        engine.proceed()
    return outputs


def run(engine: TextEngine, *requests: TextRequest) -> list[Answer]:
    """Serve requests that all come at once, without a loop."""
    outputs: dict[RequestId, list[Output]] = {}
    for number, request in enumerate(requests):
        outputs[number] = []
        admit(engine, number, request)
    for output in to_the_end(engine):
        outputs[output.id].append(output)
    return [Answer(outputs[number]) for number in range(len(requests))]


def answer(executor: FakeExecutor, request: TextRequest, **options) -> Answer:
    """Serve one request by an engine of its own."""
    return run(make_engine(executor, **options), request)[0]


async def ask(loop: EngineLoop, request: TextRequest) -> Answer:
    async with loop.submit(request) as outputs:
        return Answer([output async for output in outputs])


async def started(loop: EngineLoop, request: TextRequest) -> asyncio.Task[Answer]:
    """A request that is in the engine's hands, in a task of its own."""
    admitted = asyncio.Event()

    async def read() -> Answer:
        async with loop.submit(request) as outputs:
            admitted.set()
            return Answer([output async for output in outputs])

    task = asyncio.create_task(read())
    await admitted.wait()
    return task
