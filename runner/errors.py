"""The errors of the process, and the HTTP status each one has.

RunnerError
├── BadRequest            400  the request is wrong; the message says how
│   ├── PromptTooLong     400  longer than the context, and truncation is not allowed
│   └── TextTooLong       400  the same of a text to embed, in the words at which a parent cuts it
├── NotImplementedHere    501  a route or field that this model cannot serve
├── NotReady              503  no model yet, or shutting down
├── Busy                  503  the queue is full
├── LoadError             500  the model cannot be loaded
│   ├── AlreadyLoaded     500
│   └── InsufficientMemory 500 predicted or met; the message contains "insufficient memory" (parents look for it)
├── GenerationError       500  a step failed for this row
├── NoInput               500  a text to embed that has no tokens
└── StartupError          exit code 1: port taken, bad flags, ...
"""

from models.errors import ModelNotFoundError


class RunnerError(Exception):
    """Anything this process reports to a parent or a user in its own words."""

    status = 500


class BadRequest(RunnerError):
    """The request is wrong; the message says how."""

    status = 400


class PromptTooLong(BadRequest):
    """The prompt does not fit the context and may not be truncated."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"input length ({tokens} tokens) exceeds the model's maximum context length ({limit} tokens)")


class TextTooLong(BadRequest):
    """A text to embed does not fit the context: a parent that is told so, in these words, cuts it and asks again.

    Source: ollama v0.24.0 runner/ollamarunner/runner.go and server/routes.go.
    """

    def __init__(self) -> None:
        super().__init__("the input length exceeds the context length")


class NoInput(RunnerError):
    """A text to embed has no tokens. Source: ollama v0.24.0 runner/ollamarunner/runner.go."""

    def __init__(self) -> None:
        super().__init__("failed to create new sequence: no input provided")


class NotImplementedHere(RunnerError):
    """A route or field that this model cannot serve."""

    status = 501


class NotReady(RunnerError):
    """No model is loaded yet, or the process is shutting down."""

    status = 503


class Busy(RunnerError):
    """The queue is full."""

    status = 503


class LoadError(RunnerError):
    """The model cannot be loaded."""


class AlreadyLoaded(LoadError):
    """A second load was asked for."""

    def __init__(self) -> None:
        super().__init__("model already loaded")


class InsufficientMemory(LoadError):
    """The model or request needs more memory than there is; the message gives the figures and the remedy."""


class RankLost(LoadError):
    """One of the ranks that share the model is gone, so nothing here can go on."""


class GenerationError(RunnerError):
    """A step failed; the rows it served end with this."""


class StartupError(RunnerError):
    """The process cannot start; the message is its last line."""


def status_of(error: Exception) -> int:
    """The HTTP status for an error: its own if it is ours, 404 for a model that is not there, else 500."""
    match error:
        case RunnerError():
            return error.status
        case ModelNotFoundError():
            return 404
        case _:
            return 500
