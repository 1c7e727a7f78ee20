"""What the three dialects share: reading a body, turning options into a text request, splitting lines.

A dialect owns its routes and its bytes. It refuses to know how an answer is computed: it hands a request to the
`EngineLoop` and writes what comes back (`streaming`). What concerns pictures alone is in `pictures`.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar, assert_never

from aiohttp import web

from models.grammar import OutputFormat
from protocol.gojson import GoModel, WireError
from protocol.logprobs import Logprob
from protocol.logprobs import TokenLogprob as WireLogprob
from protocol.options import Options, PictureFields
from runner.engine.loop import EngineLoop
from runner.engine.types import (
    EngineState,
    FinishReason,
    InputImage,
    SamplingParams,
    TextRequest,
    TokenLogprob,
)
from runner.errors import BadRequest, NotImplementedHere, NotReady

MAX_TOP_LOGPROBS: Final = 20
LOWEST_LOGPROB: Final = -9999.0
"""JSON has no infinity; a probability that underflows to 0 is written as this."""

HINTS: Final = {
    "num_batch": "prompt tokens of one step; this runner bounds a step's time itself",
    "num_thread": "BLAS threads, fixed when the process starts",
    "num_gpu": "layers on the GPU; MLX runs a whole model on one device",
    "main_gpu": "which GPU; MLX runs a whole model on one device",
    "use_mmap": "how weights are read",
    "FlashAttention": "the attention kernel; MLX has one, fused",
    "NumThreads": "as num_thread",
    "BatchSize": "as num_batch; counted in the memory table",
    "GPULayers": "as num_gpu; the memory table says where the layers really are",
    "MultiUserCache": "how the prefix cache is shared; this runner shares it always",
    "MainGPU": "as main_gpu",
    "UseMmap": "as use_mmap",
}
"""Known fields that are read and not acted upon, for they cannot change a result. All others are obeyed or refused."""

PICTURE_FIELDS: Final = tuple(PictureFields.model_fields)
"""What only a request for pictures has."""
LARGE_BYTES: Final = 1 << 20
"""A body from here on is decoded beside the event loop, which has others to answer."""

Model = TypeVar("Model", bound=GoModel)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a peer may keep the runner waiting, in seconds."""

    read_s: float = 30.0
    """For the whole body of a request."""
    write_s: float = 60.0
    """For a reader to make room once its buffers are full."""


TIMEOUTS: Final = web.AppKey("timeouts", Timeouts)


class Dialect(Protocol):
    """One way parents speak."""

    def routes(self) -> Iterable[web.RouteDef]:
        """The routes to serve."""
        ...

    async def close(self) -> None:
        """Abandon what the dialect does in the background. Idempotent."""
        ...


async def read_body(request: web.Request) -> bytes:
    """The request's body.

    Raises:
        web.HTTPRequestTimeout: it did not come in time.
        web.HTTPRequestEntityTooLarge: it is larger than the application allows.
    """
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=request.content_length)
    try:
        async with asyncio.timeout(request.app[TIMEOUTS].read_s):
            return await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(text="the request's body did not arrive in time") from error


async def read_model(request: web.Request, model: type[Model]) -> Model:
    """The request's body, decoded.

    Raises:
        BadRequest: it is not JSON, or a field has the wrong type.
    """
    body = await read_body(request)
    try:
        return model.from_json(body) if len(body) < LARGE_BYTES else await asyncio.to_thread(model.from_json, body)
    except WireError as error:
        raise BadRequest(f"bad request: {error}") from error


def json_response(answer: GoModel, status: int = 200) -> web.Response:
    """An answer that is one object."""
    return web.Response(body=answer.to_line(), status=status, content_type="application/json")


def require_ready(loop: EngineLoop) -> None:
    """Refuse to call the process ready before it is.

    Raises:
        NotReady: there is no engine.
    """
    status = loop.status
    if status.state is not EngineState.READY:
        raise NotReady(status.error or f"no model is ready (state: {status.state.value})")


def refuse(field: str, why: str) -> NotImplementedHere:
    """The error for a known field that this runner cannot honour."""
    return NotImplementedHere(f"{field} is not supported: {why}")


def refuse_image_fields(
    options: Options | None, beside: PictureFields | None = None, *, width: int = 0, height: int = 0, steps: int = 0
) -> None:
    """Refuse the fields of an image request.

    Raises:
        NotImplementedHere: one of them is set.
    """
    fields: dict[str, object] = {"width": width, "height": height, "steps": steps}
    for given in (beside, options):
        if given is not None:
            fields |= {name: getattr(given, name) for name in PICTURE_FIELDS if getattr(given, name)}
    for name, value in fields.items():
        if value:
            raise refuse(name, "the loaded model generates text, not images")


def check_top_logprobs(count: int) -> int:
    """The number of alternatives to report.

    Raises:
        BadRequest: it is out of range.
    """
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise BadRequest(f"TopLogprobs must be between 0 and {MAX_TOP_LOGPROBS}, not {count}")
    return count


def text_request(
    prompt: str,
    options: Options | None,
    *,
    seed: int | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    shift: bool = False,
    truncate: bool = False,
    wanted: OutputFormat | None = None,
    images: tuple[InputImage, ...] = (),
) -> TextRequest:
    """Translate a wire request.

    Args:
        prompt: the text as sent.
        options: None gives Ollama's defaults; inside an object, an absent field is zero.
        seed: goes before the seed of the options.
        logprobs: as sent.
        top_logprobs: as sent; counts only with `logprobs`.
        shift: as sent.
        truncate: as sent.
        wanted: what the answer is held to.
        images: what the prompt may refer to.

    Raises:
        BadRequest: an option has an impossible value.
    """
    request = TextRequest(
        prompt=prompt,
        sampling=SamplingParams(seed=seed),
        logprobs=logprobs,
        top_logprobs=check_top_logprobs(top_logprobs) if logprobs else 0,
        shift=shift,
        truncate=truncate,
        format=wanted,
        images=images,
    )
    if options is None:
        return request
    if options.num_ctx < 0:
        raise BadRequest(f"num_ctx must not be negative, but is {options.num_ctx}")
    if seed is None and options.seed >= 0:
        seed = options.seed
    return replace(
        request,
        sampling=_sampling(options, seed),
        # 0, -1 (no limit) and -2 (fill the context) all mean the same to a runner.
        num_predict=options.num_predict if options.num_predict > 0 else None,
        num_ctx=options.num_ctx or None,
        num_keep=max(options.num_keep, -1),
        # An empty stop string would match before the first token.
        stop=tuple(dict.fromkeys(stop for stop in options.stop if stop)),
        # Parents send 0 for a model that has no draft model, and leave out what is 0: absent is no refusal.
        draft=max(options.draft_num_predict, 0) if "draft_num_predict" in options.model_fields_set else None,
    )


def _sampling(options: Options, seed: int | None) -> SamplingParams:
    for name in ("repeat_penalty", "typical_p", "min_p", "top_p"):
        value = getattr(options, name)
        if value < 0:
            raise BadRequest(f"{name} must not be negative, but is {value}")
    if options.min_p > 1:
        raise BadRequest(f"min_p must not be above 1, but is {options.min_p}")
    return SamplingParams(
        temperature=max(options.temperature, 0.0),
        top_k=max(options.top_k, 0),
        top_p=min(options.top_p, 1.0),
        min_p=options.min_p,
        typical_p=min(options.typical_p, 1.0),
        repeat_last_n=max(options.repeat_last_n, -1),
        repeat_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=seed,
    )


def done_reason(reason: FinishReason) -> int:
    """Ollama's number: 0 stop, 1 length."""
    match reason:
        case FinishReason.STOP:
            return 0
        case FinishReason.LENGTH:
            return 1
        case _:
            assert_never(reason)


def reason_of(error: Exception) -> str:
    """What to tell the parent of a failure; never empty."""
    return str(error) or type(error).__name__


def _finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(LOWEST_LOGPROB, logprob)


def wire_logprobs(logprobs: tuple[TokenLogprob, ...]) -> tuple[Logprob, ...]:
    """Log-probabilities as Ollama writes them."""
    return tuple(
        Logprob(
            token=entry.token,
            logprob=_finite(entry.logprob),
            top_logprobs=tuple(WireLogprob(token=top.token, logprob=_finite(top.logprob)) for top in entry.top),
        )
        for entry in logprobs
    )


def split_lines(
    text: str,
    logprobs: tuple[TokenLogprob, ...],
    encode: Callable[[str, tuple[TokenLogprob, ...]], bytes],
    max_line: int,
) -> Iterator[bytes]:
    """Encode a piece of text as one line, or as several that are each short enough for the parent's line buffer.

    A cut keeps every token's log-probability on the line of its text and gives every line some text, as long as there
    is enough of it.

    Args:
        text: the piece.
        logprobs: of the tokens that make up the text, in order.
        encode: makes the line, newline included.
        max_line: bytes a line may have, newline included.
    """
    line = encode(text, logprobs)
    if len(line) <= max_line or (len(text) <= 1 and len(logprobs) <= 1):
        yield line
        return
    half = len(logprobs) // 2
    cut = _cut(text, logprobs, half)
    first = logprobs[:half] if half else logprobs
    yield from split_lines(text[:cut], first, encode, max_line)
    yield from split_lines(text[cut:], logprobs[half:] if half else (), encode, max_line)


def _cut(text: str, logprobs: tuple[TokenLogprob, ...], half: int) -> int:
    """Where to cut the text that belongs to the first `half` tokens."""
    if len(text) <= 1:
        return len(text)
    lengths = [len(entry.token) for entry in logprobs]
    if not half:
        cut = len(text) // 2
    elif sum(lengths) == len(text):
        cut = sum(lengths[:half])
    else:
        # Tokens that are parts of a character have no text of their own to go by.
        cut = len(text) * half // len(logprobs)
    return min(max(cut, 1), len(text) - 1)
