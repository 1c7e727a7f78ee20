"""What a language model is to the engine, and what an architecture's module declares.

A batch is *ragged*: the tokens of all rows of one step lie one after another in one flat axis T. Linear layers run over
T at once; attention runs row by row against each row's own cache. So there is no padding, rows of different lengths (a
prefill chunk beside one-token decodes) share one forward pass, a row joins and leaves without copying anything, and
nothing of one row enters another's sums.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import mlx.core as mx

from models.cache import CacheType, LayerCache
from models.checkpoint import JSON


@dataclass(frozen=True, slots=True)
class Row:
    """One row of one step: how many of the flat tokens are its own, and its cache, one entry a layer."""

    length: int
    cache: Sequence[LayerCache]
    hidden_from: int | None = None
    """Keys from this position on are padding that no query sees; at least 1. None: there is none."""


class LanguageModel(Protocol):
    """A decoder-only transformer. Thread: the MLX thread, all of it."""

    vocab_size: int
    context_length: int
    num_layers: int
    computes_when_called: bool
    """A call waits for its tokens and computes; otherwise it builds a graph, mostly."""

    def __call__(self, tokens: mx.array, rows: Sequence[Row]) -> mx.array:
        """Run the rows' next tokens and append to their caches.

        Shapes: tokens int32 (T,), T = sum of the rows' lengths, row after row; returns hidden (T, D), final norm done.
        """
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """Project to the vocabulary. Shapes: hidden (N, D); returns float32 (N, V)."""
        ...

    def new_cache(self) -> list[LayerCache]:
        """A row's empty cache, one entry a layer."""
        ...

    def cache_nbytes(self, tokens: int) -> int:
        """The bytes that one row's cache of that many tokens takes over all layers. Thread: any."""
        ...


class LanguageConfig(Protocol):
    """What every architecture's configuration can say before a weight is read."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens the model was made for."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers, each with one cache entry a row."""
        ...

    def with_cache(self, cache_type: CacheType) -> Self:
        """The same configuration with caches of that kind.

        Raises:
            QuantizationError: this model's keys and values cannot be held so.
        """
        ...

    def cache_nbytes_per_layer(self, tokens: int, *, itemsize: int) -> list[int]:
        """The bytes of one row's cache of that many tokens, a number a layer; `itemsize` is the activations' width."""
        ...


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture's entry: the names it goes by and how to build it. Each module in models/llm ends with one."""

    hf: tuple[str, ...]
    """Entries of config.json's `architectures`."""
    gguf: tuple[str, ...]
    """Values of GGUF's `general.architecture`."""
    config: Callable[[Mapping[str, JSON]], LanguageConfig]
    """Reads config.json. Raises CheckpointError for missing or impossible values."""
    model: Callable[..., LanguageModel]
    """Builds the model with uninitialised weights from its config."""
