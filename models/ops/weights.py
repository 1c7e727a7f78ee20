"""Weights as an architecture declares them: names and shapes, no values.

`forward` hands these declarations to the operations; an executor finds by them what it holds. Loader, the prediction
of bytes and `create` read the same declarations.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix (outputs, inputs) under `NAME.weight`, and with `bias` a vector (outputs,) under `NAME.bias`."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors."""
        yield f"{self.name}.weight", (self.outputs, self.inputs)
        if self.bias:
            yield f"{self.name}.bias", (self.outputs,)


@dataclass(frozen=True, slots=True)
class Joined:
    """Matrices that multiply the same input, so that an executor may make one product of them (qkv, gate and up)."""

    parts: tuple[Linear, ...]
    precise: bool = False
    """A softmax weighs what comes out: an executor that rounds the input does so more finely."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The outputs of each part."""
        return tuple(part.outputs for part in self.parts)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors."""
        for part in self.parts:
            yield from part.tensors()


@dataclass(frozen=True, slots=True)
class Embedding:
    """A table (rows, width) under `NAME.weight`: of token embeddings, and where it is tied the output matrix too."""

    name: str
    rows: int
    width: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape of its tensor."""
        yield f"{self.name}.weight", (self.rows, self.width)


@dataclass(frozen=True, slots=True)
class Norm:
    """The weight (width,) of an RMSNorm under `NAME.weight`. Source: RMSNorm (arXiv 1910.07467)."""

    name: str
    width: int
    eps: float

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape of its tensor."""
        yield f"{self.name}.weight", (self.width,)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """The weight (width,) of a LayerNorm under `NAME.weight`, and with `bias` another under `NAME.bias`.

    Source: layer normalization (arXiv 1607.06450).
    """

    name: str
    width: int
    eps: float
    bias: bool = True

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors."""
        yield f"{self.name}.weight", (self.width,)
        if self.bias:
            yield f"{self.name}.bias", (self.width,)


Weight: TypeAlias = Linear | Joined | Embedding | Norm | LayerNorm
Matrix: TypeAlias = Linear | Joined | Embedding
"""What a product can be made with."""


def weights_in(declared: object) -> Iterator[Weight]:
    """Every declaration in a dataclass of them, in its tuples and in its dataclasses, in order, each once."""
    yield from dict.fromkeys(_walk(declared))


def _walk(declared: object) -> Iterator[Weight]:
    if isinstance(declared, Linear | Joined | Embedding | Norm | LayerNorm):
        yield declared
    elif isinstance(declared, tuple):
        for item in declared:
            yield from _walk(item)
    elif dataclasses.is_dataclass(declared):
        for field in dataclasses.fields(declared):
            yield from _walk(getattr(declared, field.name))
