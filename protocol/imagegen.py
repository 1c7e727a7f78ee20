"""Requests and answers of the imagegen dialect (Ollama v0.16 to v0.32): snake_case, one JSON object a line.

Source: x/imagegen/types.go and server.go at v0.17.0 and v0.32.5.
"""

from typing import Annotated

from protocol.gojson import OMIT_EMPTY, Blobs, Bool, Float32, GoModel, Int, Int32, Ints, Str
from protocol.options import Options


class CompletionRequest(GoModel):
    """POST /completion."""

    prompt: Str = ""
    options: Options | None = None
    width: Int32 = 0
    height: Int32 = 0
    steps: Int = 0
    seed: Int = 0
    images: Blobs = ()


class CompletionLine(GoModel):
    """A line of the answer. Durations in ns."""

    content: Annotated[Str, OMIT_EMPTY] = ""
    image: Annotated[Str, OMIT_EMPTY] = ""
    done: Bool = False
    done_reason: Annotated[Int, OMIT_EMPTY] = 0
    stop_reason: Annotated[Str, OMIT_EMPTY] = ""
    step: Annotated[Int, OMIT_EMPTY] = 0
    total: Annotated[Int, OMIT_EMPTY] = 0
    prompt_eval_count: Annotated[Int, OMIT_EMPTY] = 0
    prompt_eval_duration: Annotated[Int, OMIT_EMPTY] = 0
    eval_count: Annotated[Int, OMIT_EMPTY] = 0
    eval_duration: Annotated[Int, OMIT_EMPTY] = 0


class HealthResponse(GoModel):
    """GET /health."""

    status: Str = ""
    progress: Annotated[Float32, OMIT_EMPTY] = 0.0


class TokenizeRequest(GoModel):
    """POST /tokenize."""

    content: Str = ""


class TokenizeResponse(GoModel):
    """The answer to POST /tokenize."""

    tokens: Ints = ()
