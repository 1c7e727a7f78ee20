"""What an architecture's file declares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from models.arch.gguf import GGUFLayout
from models.config_reader import JSON
from models.ops import LayerState, Ops

Tensor = TypeVar("Tensor")


class ModelConfig(Protocol):
    """What every architecture's configuration can say before a weight is read."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        ...

    @property
    def intermediate_size(self) -> int:
        """The width of the widest MLP."""
        ...

    @property
    def num_heads(self) -> int:
        """Query heads of the widest layer."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers, each with one entry of state."""
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """An architecture with a configuration: what an executor runs.

    `forward` and `logits` are pure in their `Ops`; `weights` is a dataclass of declarations.
    """

    config: ModelConfig
    context_length: int
    """Tokens the model was made for."""
    weights: Any
    state: tuple[LayerState, ...]
    forward: Callable[[Ops[Any]], Any]
    """The hidden states (T, D) after the final norm."""
    logits: Callable[[Ops[Any], Any], Any]
    """From hidden states (N, D) to (N, V)."""
    other_parts: tuple[str, ...] = ()
    """Beginnings of names of tensors, without a leading `model.`, that a multimodal checkpoint has for other parts."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture's entry: the names it goes by and how to build it. Each module in models/arch ends with one."""

    hf: tuple[str, ...]
    """Entries of config.json's `architectures`."""
    gguf: tuple[GGUFLayout, ...]
    """How GGUF files of it are written; the first that applies to a file counts."""
    build: Callable[[Mapping[str, JSON]], Model]
    """Reads config.json, of a multimodal model its text part. Raises CheckpointError for missing, impossible or
    unsupported values."""
    other_parts: tuple[str, ...] = ()
    """Beginnings of names of tensors that multimodal checkpoints of it have besides, without a leading `model.`."""
