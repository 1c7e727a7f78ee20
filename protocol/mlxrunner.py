"""Requests and answers of the mlx dialect (Ollama v0.17 to v0.33).

Parents from v0.18 on read Go field names (`PromptEvalCount`), v0.17's reads snake_case (`prompt_eval_count`). Go
matches names in any case but not across underscores, so the last line carries both spellings and each parent finds its
own. From v0.34 on the prompt's cached tokens are read as well.

Source: x/mlxrunner/client.go and server.go at v0.17.0, v0.18.0, v0.22.0, v0.32.5, v0.33.0-rc2 and v0.34.0, mlxrunner/
at v0.34.4.
"""

from typing import Annotated

from pydantic import Field

from protocol.gojson import FAIL_FAST, NULL_IS_OBJECT, OMIT_EMPTY, Bool, Bytes, GoModel, Int, Str
from protocol.logprobs import Logprob
from protocol.options import Options


class Media(GoModel):
    """An image or a sound that the prompt refers to by `[img-ID]`."""

    data: Bytes = b""
    id: Int = 0
    kind: Str = Field(default="", alias="Kind")


class CompletionRequest(GoModel):
    """POST /v1/completions."""

    prompt: Str = Field(default="", alias="Prompt")
    media: Annotated[tuple[Media, ...], FAIL_FAST, NULL_IS_OBJECT] = Field(default=(), alias="Media")
    images: Annotated[tuple[Media, ...], FAIL_FAST, NULL_IS_OBJECT] = Field(default=(), alias="Images")
    options: Options | None = Field(default=None, alias="Options")
    logprobs: Bool = Field(default=False, alias="Logprobs")
    top_logprobs: Int = Field(default=0, alias="TopLogprobs")
    format: object = Field(default=None, alias="Format")
    grammar: Str = Field(default="", alias="Grammar")


class ContentLine(GoModel):
    """A line with a piece of the text."""

    content: Str = Field(default="", alias="Content")
    done: Bool = Field(default=False, alias="Done")
    done_reason: Int = Field(default=0, alias="DoneReason")
    logprobs: Annotated[tuple[Logprob, ...], OMIT_EMPTY] = Field(default=(), alias="Logprobs")


class DoneLine(ContentLine):
    """The last line. Durations in ns."""

    prompt_eval_count: Int = Field(default=0, alias="PromptEvalCount")
    prompt_eval_cached_count: Int = Field(default=0, alias="PromptEvalCachedCount")
    prompt_eval_duration: Int = Field(default=0, alias="PromptEvalDuration")
    eval_count: Int = Field(default=0, alias="EvalCount")
    eval_duration: Int = Field(default=0, alias="EvalDuration")
    snake_done_reason: Int = Field(default=0, alias="done_reason")
    snake_prompt_eval_count: Int = Field(default=0, alias="prompt_eval_count")
    snake_prompt_eval_duration: Int = Field(default=0, alias="prompt_eval_duration")
    snake_eval_count: Int = Field(default=0, alias="eval_count")
    snake_eval_duration: Int = Field(default=0, alias="eval_duration")


class StatusError(GoModel):
    """Ollama's `api.StatusError`: the parent answers its user with this status and message."""

    status_code: Int = Field(alias="StatusCode")
    status: Str = Field(default="", alias="Status")
    error: Str = ""


class ErrorLine(GoModel):
    """The last line of an answer that failed after it had begun."""

    error: StatusError = Field(alias="Error")


class StatusResponse(GoModel):
    """GET /v1/status. Memory in bytes, ContextLength in tokens, Progress in per cent."""

    status: Int = Field(default=0, alias="Status")
    progress: Int = Field(default=0, alias="Progress")
    context_length: Int = Field(default=0, alias="ContextLength")
    memory: Int = Field(default=0, alias="Memory")


class ModelsResponse(GoModel):
    """GET or POST /v1/models."""

    success: Bool = Field(default=True, alias="Success")
