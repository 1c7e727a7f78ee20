"""What can be wrong with a model: the errors this package raises for anything a user can cause.

ModelError
├── ModelNotFoundError       the reference names nothing
├── UnsupportedArchitecture  no module in models/arch or models/image implements it
├── CheckpointError          a file or tensor is missing, extra, misshaped, truncated or unreadable
├── QuantizationError        a quantisation this package does not know
├── StoreError               the Ollama store cannot take the model
├── ExecutionError           a graph that the executor's library refuses, or a step that it could not run
├── TokenizerError           no vocabulary, or one that cannot be read
└── GrammarError             a JSON schema or grammar that cannot be enforced, or whose matcher failed
"""


class ModelError(Exception):
    """A model that cannot be used; the message is written for the person who chose the model."""


class ModelNotFoundError(ModelError):
    """The reference names no model in the store, no folder and no file."""


class UnsupportedArchitecture(ModelError):
    """No module of this package implements the checkpoint's architecture."""


class CheckpointError(ModelError):
    """A checkpoint's file or tensor is not what it must be."""

    def __init__(self, reason: str, *, file: str, tensor: str | None = None) -> None:
        where = f"{file}: tensor {tensor}" if tensor else file
        super().__init__(f"{where}: {reason}")
        self.reason = reason
        self.file = file
        self.tensor = tensor


class QuantizationError(ModelError):
    """A tensor is quantised in a way that is unknown or inconsistent."""


class StoreError(ModelError):
    """A model cannot be written into the Ollama store."""


class TokenizerError(ModelError):
    """The checkpoint's vocabulary is missing or cannot be rebuilt."""


class ExecutionError(ModelError):
    """The library that runs the model refused a graph, or could not run a step."""


class GrammarError(ModelError):
    """A JSON schema or a grammar that cannot be enforced; the message is for the person who sent it."""


class ShareError(ModelError):
    """A model cannot be shared by so many ranks."""
