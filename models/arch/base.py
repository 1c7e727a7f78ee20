"""What an architecture's file declares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from models.arch.gguf import GGUFLayout
from models.config_reader import JSON
from models.ops import LayerState, Ops

Tensor = TypeVar("Tensor")
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Of a checkpoint's tensors, by name."""


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
        """Layers, with and without a state of their own."""
        ...


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors that hold several of the declared ones: how their names tell the names of what they hold."""

    pattern: str
    """A regular expression of the whole name."""
    parts: tuple[str, ...]
    """The names of what an entry of the first axis holds, its rows divided among them.

    `{n}` is the expert, `{0}` and so on are the pattern's groups.
    """
    interleaved: bool = False
    """The parts' rows take turns; else they lie one behind the other."""
    transposed: bool = False
    """A matrix is (inputs, outputs)."""
    flat: bool = False
    """All axes but the last are one: it has so many rows."""
    whole: bool = False
    """It is a tensor of no experts; its own rows are divided among the parts, or it has another name alone."""


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
    """What `Ops.attention` and its like are told the number of; a layer may have none and look at another's."""
    forward: Callable[[Ops[Any]], Any]
    """The hidden states (T, D) after the final norm."""
    logits: Callable[[Ops[Any], Any], Any] | None
    """From hidden states (N, D) to (N, V). None: an encoder, which has no words and no state."""
    stacks: tuple[Stack, ...] = ()
    """How checkpoints may store experts, besides one by one."""
    prefix: str = "model."
    """What a checkpoint's names may have, or lack, in front of those declared."""
    other_parts: tuple[str, ...] = ()
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
    gguf: tuple[GGUFLayout, ...]
    """How GGUF files of it are written; the first that applies to a file counts."""
    build: Callable[[Mapping[str, JSON]], Model]
    """Reads config.json, of a multimodal model its text part and with that `vision_config`. Raises CheckpointError for
    missing, impossible or unsupported values."""
    other_parts: tuple[str, ...] = ()
    """Beginnings of names of tensors that multimodal checkpoints of it have besides, without a leading `model.`."""
    without_gguf: str = ""
    """Why there is no such layout."""
    is_encoder: bool = False
    """Its models are encoders: see `Model.is_encoder`."""
    told_by_tensors: Callable[[Shapes], Mapping[str, JSON]] | None = None
    """What a checkpoint's tensors say that its config.json does not, as more of the latter; that goes first."""
