"""What crosses between the event loop and the MLX thread: requests in, outputs out, a status snapshot.

All are frozen values; none holds an MLX array.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeAlias

RequestId: TypeAlias = int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row draws its tokens. The defaults are Ollama's, for a request that gives no options at all."""

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
    """0 or 1 is off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None draws a seed at random."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One completion, in the engine's own words."""

    prompt: str
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_predict: int | None = None
    """None: until the context is full."""
    num_ctx: int | None = None
    """None: the model's (or the process's) limit. A larger value is capped to that."""
    num_keep: int = 4
    """Prompt tokens kept at the front by truncation and context shift; -1: all of the prompt."""
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    shift: bool = False
    """When the context is full: drop the older half after num_keep and go on, instead of ending with LENGTH."""
    truncate: bool = False
    """When the prompt is too long: drop its middle after num_keep, instead of PromptTooLong."""
    draft: int | None = None
    """Tokens drafted at once, at most; 0 is off. None: what the process allows. More is capped to that."""


Request: TypeAlias = TextRequest  # | ImageRequest, with the image engine


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text and its natural-log probability under the model's unmodified distribution."""

    token: str
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Some text of a row, valid Unicode in itself, never empty unless it carries logprobs."""

    id: RequestId
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TextDone:
    """The end of a row, with its counts. Durations in ns; prompt_ns from admission to the first token."""

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
class Failed:
    """The end of a row by an error of its step."""

    id: RequestId
    error: Exception


Output: TypeAlias = TextChunk | TextDone | Failed


class EngineState(Enum):
    """The life of the loop's engine."""

    LAUNCHED = "launched"
    LOADING = "loading"
    READY = "ready"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot that each tick replaces; reading it never waits for the MLX thread."""

    state: EngineState = EngineState.LAUNCHED
    progress: float = 0.0
    """0 to 1, while loading."""
    error: str | None = None
    context_length: int = 0
    """Tokens one row may hold."""
    memory_bytes: int = 0
    """Bytes MLX holds."""
    prefix_cache_bytes: int = 0
    """Of these, what the prefix cache holds."""
    running: int = 0
    """Rows in the batch."""
    waiting: int = 0
    """Requests in the queue."""
    drafted_tokens: int = 0
    """Guessed ahead of the model since the load."""
    accepted_tokens: int = 0
    """Of these, what the model said as well."""


class Engine(Protocol):
    """What the loop drives. Lives in the MLX thread except for `prepare`."""

    def prepare(self, request: Request) -> object:
        """Check and tokenise a request. Thread: any; touches no MLX.

        Raises:
            BadRequest: the request cannot be served; nothing was kept.
        """
        ...

    def add(self, request_id: RequestId, prepared: object) -> None:
        """Queue a prepared request."""
        ...

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request wherever it is. An unknown id is no error: a cancel races with the finish."""
        ...

    def step(self) -> list[Output]:
        """One unit of work: at most one prefill chunk and one token per row. Empty when there is nothing to do."""
        ...

    def proceed(self) -> None:
        """Set off what `step` has left ready, now that its outputs are handed over. May take most of a step's time."""
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
        """No request is queued or running."""
        ...

    def status(self) -> EngineStatus:
        """The present figures, state READY."""
        ...

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of `text`. Thread: any; touches no MLX."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
