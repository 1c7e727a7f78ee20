"""The classic dialect: `runner --ollama-engine` or no engine flag, spoken by Ollama up to v0.24.

The process listens at once and loads when POST /load says so: fit and alloc answer with the memory table, commit loads
in the background while GET /health counts, close frees everything and makes room for another load.

A parent stops reading after 30 consecutive pieces that are equal once stripped, whatever they are: that is its guard
against a model that loops, and nothing here works around it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from aiohttp import web

from models.device import Device
from protocol import ollamarunner as wire
from protocol.gojson import TextLine, write_line
from protocol.ollamarunner import LoadOperation, ServerStatus
from runner.config import CACHE_TYPES
from runner.dialects.base import (
    done_reason,
    json_response,
    read_model,
    reason_of,
    refuse,
    refuse_image_fields,
    split_lines,
    text_request,
    wire_logprobs,
)
from runner.dialects.embedding import answer_embedding
from runner.dialects.formats import output_format
from runner.dialects.ollamarunner_pictures import MAX_LINE, OllamaRunnerPictureEncoder, parse_image
from runner.dialects.pictures import PictureAnswer
from runner.dialects.streaming import TextAnswer, stream
from runner.engine.load import DeviceMemory, LoadOptions, MemoryPlan, ModelLoader
from runner.engine.loop import BuildEngine, EngineLoop
from runner.engine.types import EngineState, InputImage, TextChunk, TextDone, TextRequest, TokenLogprob
from runner.errors import AlreadyLoaded, BadRequest, InsufficientMemory, LoadError, NotReady

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = "application/json"
LIBRARIES: Final = {"metal": "Metal", "cuda": "CUDA"}
"""How Ollama calls the GPUs' libraries. A CPU is none of its devices: it has its own column in the memory table."""
STATUS: Final = {
    EngineState.LAUNCHED: ServerStatus.LAUNCHED,
    EngineState.LOADING: ServerStatus.LOADING,
    EngineState.READY: ServerStatus.READY,
    EngineState.ERROR: ServerStatus.ERROR,
}


class OllamaRunnerDialect:
    """Routes of the classic dialect."""

    def __init__(
        self,
        model: str | None,
        loop: EngineLoop,
        loader: ModelLoader,
        device: Callable[[], Device],
        *,
        check_memory: bool,
    ) -> None:
        self._model = model
        self._loop = loop
        self._loader = loader
        self._device = device
        self._check_memory = check_memory
        self._turn = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None

    def routes(self) -> Iterable[web.RouteDef]:
        """The routes to serve."""
        return (
            web.get("/health", self._health),
            web.get("/info", self._info),
            web.post("/load", self._load),
            web.post("/completion", self._completion),
            web.post("/embedding", self._embedding),
        )

    async def close(self) -> None:
        """Abandon a load in flight. Idempotent."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait({self._loading})

    async def _health(self, _request: web.Request) -> web.Response:
        status = self._loop.status
        state = EngineState.LOADING if self._is_loading() else status.state
        failed = state is EngineState.ERROR
        return json_response(
            wire.HealthResponse(
                status=STATUS[state],
                progress=status.progress,
                error=(status.error or "") if failed else "",
                step=status.step,
                total_steps=status.total_steps,
            )
        )

    async def _info(self, _request: web.Request) -> web.Response:
        device = await asyncio.to_thread(self._device)
        return web.Response(
            body=write_line([entry.to_value() for entry in devices(device)]), content_type="application/json"
        )

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await read_model(request, wire.CompletionRequest)
        await self._loaded()
        if self._loop.status.makes_pictures:
            pictures = PictureAnswer(OllamaRunnerPictureEncoder())
            return await stream(request, self._loop, parse_image(body), pictures, CONTENT_TYPE)
        return await stream(request, self._loop, parse(body), TextAnswer(OllamaRunnerEncoder()), CONTENT_TYPE)

    async def _embedding(self, request: web.Request) -> web.Response:
        await self._loaded()
        return await answer_embedding(request, self._loop)

    async def _load(self, request: web.Request) -> web.Response:
        body = await read_model(request, wire.LoadRequest)
        try:
            operation = LoadOperation(body.operation)
        except ValueError as error:
            raise BadRequest(f"unknown load operation {body.operation}") from error
        async with self._turn:
            if operation is LoadOperation.CLOSE:
                await self._unload()
                return json_response(wire.LoadResponse())
            if self._is_loading() or self._loop.status.state in (EngineState.LOADING, EngineState.READY):
                raise AlreadyLoaded
            return json_response(await self._try_load(operation, load_options(body)))

    async def _try_load(self, operation: LoadOperation, options: LoadOptions) -> wire.LoadResponse:
        if self._model is None:
            raise LoadError("no model to load: start the runner with --model")
        plan = await asyncio.to_thread(self._loader.plan, self._model, options)
        success = plan.fits or not self._check_memory
        if success and operation is LoadOperation.COMMIT:
            try:
                build = await asyncio.to_thread(self._loader.builder, self._model, options)
            except InsufficientMemory as error:
                # Memory went away between the two looks.
                logger.warning("load refused", extra={"fields": {"reason": str(error)}})
                success = False
            else:
                self._start(build)
        return wire.LoadResponse(success=success, memory=memory_table(plan))

    def _start(self, build: BuildEngine) -> None:
        self._loading = asyncio.create_task(self._loop.load(build))
        self._loading.add_done_callback(_log_load)

    def _is_loading(self) -> bool:
        return self._loading is not None and not self._loading.done()

    async def _loaded(self) -> None:
        """Wait for a load in flight, as Ollama's runner does.

        Raises:
            LoadError: it failed.
        """
        if self._loading is not None and not self._loading.done():
            await asyncio.wait({self._loading})
        status = self._loop.status
        if status.state is EngineState.ERROR:
            raise LoadError(status.error or "the model could not be loaded")

    async def _unload(self) -> None:
        await self._loop.unload()
        await self.close()
        # A load that had only just been asked for may have begun after the first call.
        await self._loop.unload()
        self._loading = None


def _log_load(task: asyncio.Task[None]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if isinstance(error, NotReady):
        logger.info("load given up", extra={"fields": {"reason": str(error)}})
    elif error is not None:
        logger.error("load failed", extra={"fields": {"error": str(error)}}, exc_info=error)


def load_options(body: wire.LoadRequest) -> LoadOptions:
    """Translate a load request.

    Raises:
        BadRequest: a size is impossible.
        NotImplementedHere: it asks for something this runner cannot do.
    """
    for name, value in (("Parallel", body.parallel), ("BatchSize", body.batch_size), ("KvSize", body.kv_size)):
        if value < 0:
            raise BadRequest(f"{name} must not be negative, but is {value}")
    if any(body.lora_path):
        raise refuse("LoraPath", "LoRA adapters cannot be applied; merge them into the model")
    cache_type = next((known for known in CACHE_TYPES if known == body.kv_cache_type), None)
    if body.kv_cache_type and cache_type is None:
        raise refuse(
            f"KvCacheType {body.kv_cache_type[:16]!r}",
            f"the cache can be one of {', '.join(CACHE_TYPES)}; set OLLAMA_KV_CACHE_TYPE to one of these or unset it",
        )
    parallel = body.parallel or 1
    context = body.kv_size // parallel
    if body.kv_size and not context:
        raise BadRequest(f"KvSize {body.kv_size} is too small for {parallel} parallel sequences")
    return LoadOptions(
        parallel=parallel,
        context_per_row=context or None,
        batch_tokens=body.batch_size or None,
        cache_type=cache_type,
        projector=Path(body.projector_path) if body.projector_path else None,
    )


def memory_table(plan: MemoryPlan) -> wire.Memory:
    """A plan as Ollama writes it: everything lies on one device, and every list has an entry a layer."""
    device = plan.device
    layers = max(len(device.weights), len(device.cache))
    weights = device.weights + (0,) * (layers - len(device.weights))
    cache = device.cache + (0,) * (layers - len(device.cache))
    library = LIBRARIES.get(device.backend)
    if library is None:
        cpu = wire.DeviceMemory(name="CPU", weights=weights, cache=cache, graph=device.graph)
        return wire.Memory(input_weights=plan.input_weights, cpu=cpu)
    nothing = (0,) * layers
    return wire.Memory(
        input_weights=plan.input_weights,
        cpu=wire.DeviceMemory(name="CPU", weights=nothing, cache=nothing),
        gpus=(_gpu_memory(device, library, weights, cache),),
    )


def _gpu_memory(
    device: DeviceMemory, library: str, weights: tuple[int, ...], cache: tuple[int, ...]
) -> wire.DeviceMemory:
    return wire.DeviceMemory(
        id=device.id, backend=library, name=device.name, weights=weights, cache=cache, graph=device.graph
    )


def devices(device: Device) -> tuple[wire.Device, ...]:
    """The devices a parent may plan for: the GPU, or none.

    Ollama takes every entry for a GPU, so a CPU must not be among them (as it is not in Ollama's own answer).
    """
    library = LIBRARIES.get(device.kind)
    if library is None:
        return ()
    return (
        wire.Device(
            id="0",
            backend=library,
            name=device.name,
            description=device.name,
            integrated=device.kind == "metal",
            total_memory=device.total_bytes,
            free_memory=device.available_bytes,
        ),
    )


def parse(body: wire.CompletionRequest) -> TextRequest:
    """Translate a wire request for text.

    Raises:
        BadRequest: an option has an impossible value.
        NotImplementedHere: it asks for something this runner cannot do.
    """
    wanted = output_format(grammar=body.grammar, schema=body.format)
    # At the top, Format is the text's own.
    beside = body.model_copy(update={"format": None})
    refuse_image_fields(body.options, beside, width=body.width, height=body.height, steps=body.steps)
    return text_request(
        body.prompt,
        body.options,
        seed=body.seed if body.seed > 0 else None,
        logprobs=body.logprobs,
        top_logprobs=body.top_logprobs,
        shift=body.shift,
        truncate=body.truncate,
        wanted=wanted,
        images=tuple(InputImage(image.id, image.data) for image in body.images),
    )


class OllamaRunnerEncoder:
    """Lines of the classic dialect.

    A parent drops the log-probabilities of a line without content, so those of a token without text of its own wait for
    the next line that has some, or for the last.
    """

    def __init__(self) -> None:
        self._held: tuple[TokenLogprob, ...] = ()

    def chunk(self, chunk: TextChunk) -> Iterator[bytes]:
        """A line, several if it is too long for the parent, or none yet."""
        logprobs = self._held + chunk.logprobs
        self._held = () if chunk.text else logprobs
        if chunk.text:
            yield from split_lines(chunk.text, logprobs, _content_line, MAX_LINE)

    def done(self, done: TextDone) -> Iterator[bytes]:
        """The counts; the stop token counts as generated here."""
        yield wire.CompletionLine(
            done=True,
            done_reason=done_reason(done.reason),
            prompt_eval_count=done.prompt_tokens,
            prompt_eval_duration=done.prompt_ns,
            eval_count=done.eval_tokens + done.stop_token,
            eval_duration=done.eval_ns,
            logprobs=wire_logprobs(self._held),
        ).to_line()

    def error(self, error: Exception) -> bytes:
        """A line that makes the parent fail the request."""
        return wire.ErrorLine(error=reason_of(error)).to_line()


_plain_line: Final = TextLine(wire.CompletionLine(), "content")


def _content_line(text: str, logprobs: tuple[TokenLogprob, ...]) -> bytes:
    if not logprobs:
        return _plain_line(text)
    return wire.CompletionLine(content=text, logprobs=wire_logprobs(logprobs)).to_line()
