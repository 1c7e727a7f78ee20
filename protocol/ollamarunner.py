"""Requests and answers of the classic dialect (ollama-engine and llama runners, to Ollama v0.24).

Source: llm/server.go, ml/device.go and runner/ollamarunner/runner.go at v0.17.0 and v0.24.0.
"""

from enum import IntEnum
from typing import Annotated

from pydantic import Field

from protocol.gojson import (
    FAIL_FAST,
    NULL_IS_OBJECT,
    OMIT_EMPTY,
    Bool,
    Bytes,
    Float32,
    GoModel,
    Int,
    Int32,
    Ints,
    NilInts,
    NilStrings,
    Str,
    Strings,
)
from protocol.logprobs import Logprob
from protocol.options import Options, PictureFields


class ServerStatus(IntEnum):
    """The number that GET /health answers."""

    READY = 0
    NO_SLOTS = 1
    LAUNCHED = 2
    LOADING = 3
    NOT_RESPONDING = 4
    ERROR = 5


class LoadOperation(IntEnum):
    """What POST /load asks for, in the order of how far it goes."""

    FIT = 0
    ALLOC = 1
    COMMIT = 2
    CLOSE = 3


class HealthResponse(GoModel):
    """GET /health. Progress is 0 to 1; `error` is an addition that Go's parents ignore."""

    status: Int = 0
    progress: Float32 = 0.0
    error: Annotated[Str, OMIT_EMPTY] = ""
    step: Annotated[Int, OMIT_EMPTY] = 0
    total_steps: Annotated[Int, OMIT_EMPTY] = 0
    """Of the picture in the making: additions as well."""


class Image(GoModel):
    """An image that the prompt refers to by `[img-ID]`."""

    data: Bytes = b""
    id: Int = 0


class CompletionRequest(PictureFields):
    """POST /completion."""

    prompt: Str = Field(default="", alias="Prompt")
    format: object = Field(default=None, alias="Format")
    images: Annotated[tuple[Image, ...], FAIL_FAST, NULL_IS_OBJECT] = Field(default=(), alias="Images")
    options: Options | None = Field(default=None, alias="Options")
    grammar: Str = Field(default="", alias="Grammar")
    shift: Bool = Field(default=False, alias="Shift")
    truncate: Bool = Field(default=False, alias="Truncate")
    logprobs: Bool = Field(default=False, alias="Logprobs")
    top_logprobs: Int = Field(default=0, alias="TopLogprobs")
    width: Int32 = 0
    height: Int32 = 0
    steps: Int32 = 0
    seed: Int = 0


class CompletionLine(GoModel):
    """A line of the answer. Durations in ns."""

    content: Str = ""
    done_reason: Int = 0
    done: Bool = False
    prompt_eval_count: Int = 0
    prompt_eval_duration: Int = 0
    eval_count: Int = 0
    eval_duration: Int = 0
    logprobs: Annotated[tuple[Logprob, ...], OMIT_EMPTY] = ()


class StepLine(GoModel):
    """A denoising step of a picture is done, or (an addition) a place in the queue has changed."""

    content: Str = ""
    done: Bool = False
    step: Annotated[Int, OMIT_EMPTY] = 0
    total_steps: Annotated[Int, OMIT_EMPTY] = 0
    queue: Annotated[Int, OMIT_EMPTY] = 0
    index: Annotated[Int, OMIT_EMPTY] = 0
    preview: Annotated[Bytes, OMIT_EMPTY] = b""


class PictureLine(GoModel):
    """A picture. Format, seed, index, size and the last two durations are additions. Durations in ns."""

    content: Str = ""
    done_reason: Int = 0
    done: Bool
    seed: Int
    index: Annotated[Int, OMIT_EMPTY] = 0
    format: Str
    width: Int
    height: Int
    prompt_eval_duration: Int = 0
    eval_count: Int = 0
    eval_duration: Int = 0
    decode_duration: Int = 0
    queue_duration: Int = 0
    image: Bytes


class ErrorLine(GoModel):
    """The last line of an answer that failed after it had begun.

    The dialect has no error field: a Go parent ignores `error`. It must not take the stream's end for an answer either,
    so `done` has the wrong type on purpose: the parent then fails the request and keeps the runner.
    """

    error: Str
    done: Str = "error"


class LayersOnDevice(GoModel):
    """Which layers the parent wishes to see on one device."""

    id: Str = ""
    backend: Str = ""
    layers: Ints = Field(default=(), alias="Layers")


class LoadRequest(GoModel):
    """POST /load. KvSize is the context of all Parallel sequences together, in tokens."""

    operation: Int = Field(default=0, alias="Operation")
    lora_path: Strings = Field(default=(), alias="LoraPath")
    parallel: Int = Field(default=0, alias="Parallel")
    batch_size: Int = Field(default=0, alias="BatchSize")
    flash_attention: Int32 = Field(default=0, alias="FlashAttention")
    kv_size: Int = Field(default=0, alias="KvSize")
    kv_cache_type: Str = Field(default="", alias="KvCacheType")
    num_threads: Int = Field(default=0, alias="NumThreads")
    gpu_layers: Annotated[tuple[LayersOnDevice, ...], FAIL_FAST, NULL_IS_OBJECT] = Field(default=(), alias="GPULayers")
    multi_user_cache: Bool = Field(default=False, alias="MultiUserCache")
    projector_path: Str = Field(default="", alias="ProjectorPath")
    main_gpu: Int = Field(default=0, alias="MainGPU")
    use_mmap: Bool = Field(default=False, alias="UseMmap")


class DeviceMemory(GoModel):
    """What one device holds, in bytes. Weights and Cache have an entry a layer, the last one for the output layer.

    A parent indexes every device's lists with the layers of the CPU's, so all lists of one answer have the same length.
    """

    id: Str = ""
    backend: Annotated[Str, OMIT_EMPTY] = ""
    name: Str = Field(default="", alias="Name")
    weights: NilInts = Field(default=None, alias="Weights")
    cache: NilInts = Field(default=None, alias="Cache")
    graph: Int = Field(default=0, alias="Graph")


class Memory(GoModel):
    """The memory table: InputWeights always lie on the CPU's side."""

    input_weights: Int = Field(default=0, alias="InputWeights")
    cpu: DeviceMemory = Field(default=DeviceMemory(), alias="CPU")
    gpus: tuple[DeviceMemory, ...] | None = Field(default=None, alias="GPUs")


class LoadResponse(GoModel):
    """The answer to POST /load."""

    success: Bool = Field(default=False, alias="Success")
    memory: Memory = Field(default=Memory(), alias="Memory")


class Device(GoModel):
    """An entry of GET /info: a GPU. Memory in bytes."""

    id: Str = ""
    backend: Annotated[Str, OMIT_EMPTY] = ""
    name: Str = ""
    description: Str = ""
    integrated: Annotated[Bool, OMIT_EMPTY] = Field(default=False, alias="integration")
    total_memory: Int = 0
    free_memory: Annotated[Int, OMIT_EMPTY] = 0
    compute_major: Int = Field(default=0, alias="ComputeMajor")
    compute_minor: Int = Field(default=0, alias="ComputeMinor")
    library_path: NilStrings = Field(default=None, alias="LibraryPath")
