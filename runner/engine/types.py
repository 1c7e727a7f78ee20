"""What crosses between the event loop and the executor's thread: requests in, outputs out, a status snapshot.

All are frozen values; none holds an array of an executor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import ClassVar, Literal, Protocol, TypeAlias

from models.embedding import Vector
from models.grammar import OutputFormat
from models.image.base import PictureRequest, Pixels
from models.sampling import Sampling

RequestId: TypeAlias = int
ImageFormat: TypeAlias = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row draws its tokens; finite numbers. The defaults are Ollama's, for a request that gives no options."""

    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 40
    """0 is off."""
    top_p: float = 0.9
    """0 or 1 is off."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """0 or 1 is off."""
    repeat_last_n: int = 64
    """Tokens the penalties look back on, prompt included; 0 is off, -1 is the context."""
    repeat_penalty: float = 1.0
    """Not negative; 0 or 1 is off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None draws a seed at random."""

    @property
    def sampling(self) -> Sampling:
        """The same as an executor is told."""
        return Sampling(**{each.name: getattr(self, each.name) for each in fields(Sampling)})


@dataclass(frozen=True, slots=True)
class InputImage:
    """A picture that a prompt refers to by `[img-ID]`, as a file."""

    id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One completion, in the engine's own words. Who makes it has checked the ranges that are stated here."""

    prompt: str
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_predict: int | None = None
    """At least 1. None: until the context is full."""
    num_ctx: int | None = None
    """At least 1. None: the model's (or the process's) limit. A larger value is capped to that."""
    num_keep: int = 4
    """Prompt tokens kept at the front by truncation and context shift; -1: all of the prompt."""
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    """0 to 20."""
    shift: bool = False
    """When the context is full: drop the older half after num_keep and go on, instead of ending with LENGTH."""
    truncate: bool = False
    """When the prompt is too long: drop its middle after num_keep, instead of PromptTooLong."""
    draft: int | None = None
    """Tokens drafted at once, at most; 0 is off. None: what the process allows. More is capped to that."""
    format: OutputFormat | None = None
    """What the answer is held to; None: to nothing."""
    images: tuple[InputImage, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One or several pictures, as they were asked for; None is the pipeline's own choice."""

    prompt: str
    width: int | None = None
    height: int | None = None
    """Pixels."""
    steps: int | None = None
    """Denoising steps."""
    seed: int | None = None
    """Of the first picture, the next one has one more; None draws a seed at random."""
    guidance: float | None = None
    """0 is off."""
    negative_prompt: str = ""
    images: tuple[bytes, ...] = ()
    """Input pictures, encoded."""
    strength: float | None = None
    preview: int = 0
    """Every so many steps progress carries a preview; 0 is never."""
    format: str = "png"
    """As it was asked for: png, jpeg or webp."""
    count: int = 1
    step_cache: float = 0.0
    """0 is off."""


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """The vectors of texts, each by itself."""

    texts: tuple[str, ...]
    dimensions: int | None = None
    """Values that are left of each vector, at least 1. None: as the model has it."""
    num_ctx: int | None = None
    """At least 1: tokens that a text may have. None: the model's (or the process's) limit, to which more is capped."""


Request: TypeAlias = TextRequest | ImageRequest | EmbeddingRequest


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text and its natural-log probability under the model's distribution over the tokens it may say."""

    token: str
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Some text of a row, valid Unicode in itself, never empty unless it carries logprobs."""

    is_last: ClassVar[bool] = False
    id: RequestId
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDone:
    """The end of a row, with its counts. Durations in ns; prompt_ns from admission to the first token."""

    is_last: ClassVar[bool] = True
    id: RequestId
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prompt_ns: int
    eval_tokens: int
    """Generated tokens, those cut off by a stop string included, the stop token not."""
    eval_ns: int
    """From the first to the last generated token."""
    stop_token: bool = False
    """A stop token ended the row: Ollama's classic runner counts it in eval_count, its MLX runner does not."""
    drafted_tokens: int = 0
    """Guessed ahead of the model."""
    accepted_tokens: int = 0
    """Of these, what the model said as well."""


@dataclass(frozen=True, slots=True)
class ImageQueued:
    """An image request waits; told whenever its place has changed."""

    is_last: ClassVar[bool] = False
    id: RequestId
    place: int
    """1 is the next to run."""


@dataclass(frozen=True, slots=True)
class ImageProgress:
    """A denoising step of a picture is done."""

    is_last: ClassVar[bool] = False
    id: RequestId
    step: int
    total: int
    index: int = 0
    """Which picture of the request."""
    preview: Pixels | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture and how it came about. Durations in ns."""

    pixels: Pixels
    request: PictureRequest
    """What it was made from, without the input pictures."""
    noised: bool
    """An input picture was noised, by the request's strength."""
    model: str
    format: ImageFormat
    """What it is to be sent as."""
    index: int
    """Which picture of the request."""
    steps_computed: int
    """Denoising steps that the step cache did not answer."""
    wait_ns: int
    """From the request's arrival, or from the end of the picture before it, to the first unit of work."""
    encode_ns: int
    denoise_ns: int
    decode_ns: int


@dataclass(frozen=True, slots=True)
class ImageMade:
    """A picture of several; others follow."""

    is_last: ClassVar[bool] = False
    id: RequestId
    picture: Picture


@dataclass(frozen=True, slots=True)
class ImageDone:
    """The end of an image request: its last picture."""

    is_last: ClassVar[bool] = True
    id: RequestId
    picture: Picture


@dataclass(frozen=True, slots=True)
class EmbeddingDone:
    """The vectors of a request's texts, in their order."""

    is_last: ClassVar[bool] = True
    id: RequestId
    vectors: tuple[Vector, ...]
    tokens: int
    """Of all texts, special ones included."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request by an error of its step."""

    is_last: ClassVar[bool] = True
    id: RequestId
    error: Exception


Output: TypeAlias = TextChunk | TextDone | ImageQueued | ImageProgress | ImageMade | ImageDone | EmbeddingDone | Failed
"""Each says itself whether it is its request's last."""


class EngineState(Enum):
    """The life of the loop's engine."""

    LAUNCHED = "launched"
    LOADING = "loading"
    READY = "ready"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot that each tick replaces; reading it never waits for the executor's thread."""

    state: EngineState = EngineState.LAUNCHED
    progress: float = 0.0
    """0 to 1, while loading."""
    error: str | None = None
    context_length: int = 0
    """Tokens one row may hold."""
    memory_bytes: int = 0
    """Bytes that the model and its state hold."""
    prefix_cache_bytes: int = 0
    """Of these, what the prefix cache holds."""
    image_cache_bytes: int = 0
    """Of these, what the vision tower made of pictures, kept for later turns or in use."""
    makes_pictures: bool = False
    """The engine takes ImageRequests, not TextRequests."""
    step: int = 0
    total_steps: int = 0
    """Denoising steps of the picture in the making that are behind, and in all; 0 of 0 if there is none."""
    running: int = 0
    """Rows in the batch, or the picture in the making."""
    waiting: int = 0
    """Requests in the queue."""
    drafted_tokens: int = 0
    """Guessed ahead of the model since the load."""
    accepted_tokens: int = 0
    """Of these, what the model said as well."""


class Engine(Protocol):
    """What the loop drives. Lives in the executor's thread except for `prepare`."""

    def prepare(self, request: Request) -> object:
        """Check a request; tokenise it, or decode its input pictures. Thread: any; touches no array.

        Raises:
            BadRequest: the request cannot be served; nothing was kept.
            NotImplementedHere: the engine serves requests of the other kind.
        """
        ...

    def is_quick(self, request: Request) -> bool:
        """Whether preparing a request takes less time than handing it to a thread. Thread: any."""
        ...

    def completion(self, prepared: object) -> Callable[[], None] | None:
        """What is left of preparing, which may run beside the request's computing. Thread: any.

        It is to be called once, in any thread, and raises what `prepare` raises; the request is to be cancelled then.
        None: nothing is left.
        """
        ...

    def add(self, request_id: RequestId, prepared: object) -> None:
        """Queue a prepared request, whether it is complete or not."""
        ...

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request wherever it is. An unknown id is no error: a cancel races with the finish."""
        ...

    def step(self) -> list[Output]:
        """One unit of work: at most one prefill chunk and one token per row, or one step of a picture."""
        ...

    def proceed(self) -> None:
        """Do what can wait until the outputs of `step` are handed over."""
        ...

    def abandon(self, error: Exception) -> list[Output]:
        """After `step` or `proceed` raised: drop the rows it may have damaged.

        Returns what had been said before, then a Failed for each of them.
        """
        ...

    @property
    def max_requests(self) -> int:
        """How many requests may be running and waiting at once. Thread: any."""
        ...

    @property
    def idle(self) -> bool:
        """There is nothing to do before a request is added, cancelled or complete."""
        ...

    def status(self) -> EngineStatus:
        """The present figures, state READY."""
        ...

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of `text`. Thread: any; touches no array. Raises NotImplementedHere, BadRequest."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
