"""What an architecture's file declares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

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
class GGUFNames:
    """How llama.cpp's converter writes an architecture."""

    architectures: tuple[str, ...]
    """Values of `general.architecture`."""
    hf: str
    """What config.json's `architectures` would say."""
    model_type: str
    top: Mapping[str, str]
    """Hugging Face's names of the tensors outside of layers, without `.weight`, by GGUF's."""
    layer: Mapping[str, str]
    """The same within a layer."""
    interleaved: tuple[str, ...] = ()
    """Tensors of a layer whose heads have their rows interleaved (a rope that pairs neighbours; ours pairs halves)."""
    layers: str = "model.layers"
    """What the names within layers begin with, before the layer's number."""
    is_encoder: bool = False
    """The metadata has what encoders have, in place of what decoders do."""


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
    logits: Callable[[Ops[Any], Any], Any] | None
    """From hidden states (N, D) to (N, V). None: an encoder, which has no words and no state."""
    prefix: str = "model."
    """What a checkpoint's names may have, or lack, in front of those declared."""
    unused: tuple[str, ...] = ()
    """Beginnings of names, without that prefix, of what a checkpoint may hold besides and nobody asks for."""

    @property
    def is_encoder(self) -> bool:
        """Every token sees the whole text."""
        return self.logits is None


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture's entry: the names it goes by and how to build it. Each module in models/arch ends with one."""

    hf: tuple[str, ...]
    """Entries of config.json's `architectures`."""
    gguf: tuple[GGUFNames, ...]
    build: Callable[[Mapping[str, JSON]], Model]
    """Reads config.json. Raises CheckpointError for missing, impossible or unsupported values."""
    is_encoder: bool = False
    """Its models are encoders: see `Model.is_encoder`."""
