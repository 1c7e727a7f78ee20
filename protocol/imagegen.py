"""Requests and answers of the imagegen dialect (Ollama v0.16 to v0.32): snake_case, one JSON object a line.

Source: x/imagegen/types.go and server.go at v0.17.0 and v0.32.5.
"""

from typing import Annotated

from protocol.gojson import OMIT_EMPTY, Blobs, Bool, Bytes, Float32, GoModel, Int, Int32, Ints, Str
from protocol.options import Options, PictureFields


class CompletionRequest(PictureFields):
    """POST /completion."""

    prompt: Str = ""
    options: Options | None = None
    width: Int32 = 0
    height: Int32 = 0
    steps: Int = 0
    seed: Int = 0
    images: Blobs = ()
    grammar: Str = ""


class CompletionLine(GoModel):
    """A line of an answer in text, or an error. Durations in ns."""

    content: Annotated[Str, OMIT_EMPTY] = ""
    done: Bool = False
    done_reason: Annotated[Int, OMIT_EMPTY] = 0
    stop_reason: Annotated[Str, OMIT_EMPTY] = ""
    prompt_eval_count: Annotated[Int, OMIT_EMPTY] = 0
    prompt_eval_duration: Annotated[Int, OMIT_EMPTY] = 0
    eval_count: Annotated[Int, OMIT_EMPTY] = 0
    eval_duration: Annotated[Int, OMIT_EMPTY] = 0


class QueueLine(GoModel):
    """A line of an image request that waits: an addition, which Ollama's parents read as a line without news."""

    queue: Int
    """1 is the next to run."""
    done: Bool = False


class StepLine(GoModel):
    """A denoising step is done. The picture's index and the preview are additions that Ollama's parents ignore."""

    step: Int
    total: Int
    index: Annotated[Int, OMIT_EMPTY] = 0
    preview: Annotated[Bytes, OMIT_EMPTY] = b""
    """A small JPEG."""
    done: Bool = False


class PictureLine(GoModel):
    """A picture of several that is not the last. All but image and done are additions."""

    index: Int
    seed: Int
    format: Str
    image: Bytes
    done: Bool = False


class PictureDoneLine(GoModel):
    """The last line of an image request. All from seed to height, and the last two, are additions. Durations in ns."""

    done: Bool = True
    done_reason: Int = 0
    stop_reason: Str = "stop"
    seed: Int
    index: Annotated[Int, OMIT_EMPTY] = 0
    format: Str
    width: Int
    height: Int
    prompt_eval_duration: Annotated[Int, OMIT_EMPTY] = 0
    """Of reading the prompt and the input pictures."""
    eval_count: Annotated[Int, OMIT_EMPTY] = 0
    """Denoising steps that were computed."""
    eval_duration: Annotated[Int, OMIT_EMPTY] = 0
    """Of all denoising steps."""
    decode_duration: Annotated[Int, OMIT_EMPTY] = 0
    queue_duration: Annotated[Int, OMIT_EMPTY] = 0
    image: Bytes


class HealthResponse(GoModel):
    """GET /health. What follows the progress, of the picture in the making, is an addition."""

    status: Str = ""
    progress: Annotated[Float32, OMIT_EMPTY] = 0.0
    step: Annotated[Int, OMIT_EMPTY] = 0
    total: Annotated[Int, OMIT_EMPTY] = 0
    queue: Annotated[Int, OMIT_EMPTY] = 0
    """Requests that wait."""


class TokenizeRequest(GoModel):
    """POST /tokenize."""

    content: Str = ""


class TokenizeResponse(GoModel):
    """The answer to POST /tokenize."""

    tokens: Ints = ()
