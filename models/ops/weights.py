"""Weights as an architecture declares them: names and shapes, no values.

`forward` hands these declarations to the operations; an executor finds by them what it holds. Loader, the prediction
of bytes and `create` read the same declarations.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

Axis: TypeAlias = Literal["outputs", "inputs", "rows", "columns", "experts", "heads", "channels", "width"]
"""Along what several ranks may share a weight; how they do is read off what is done with it."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix (outputs, inputs) under `NAME.weight`, and with `bias` a vector (outputs,) under `NAME.bias`."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    may_be_cut: ClassVar[tuple[Axis, ...]] = ("outputs", "inputs")
    """By outputs each rank makes some of them; by inputs, a part of the sum that all of them are."""
    axes: tuple[int, ...] = ()
    """What `inputs` is divided into as it is stored: of a patch (channels, height, width), frames perhaps between."""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors."""
        yield f"{self.name}.weight", (self.outputs, *(self.axes or (self.inputs,)))
        if self.bias:
            yield f"{self.name}.bias", (self.outputs,)


@dataclass(frozen=True, slots=True)
class Joined:
    """Matrices that multiply the same input, so that an executor may make one product of them (qkv, gate and up)."""

    may_be_cut: ClassVar[tuple[Axis, ...]] = ("outputs", "inputs")
    """As its parts, each by itself."""
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

    may_be_cut: ClassVar[tuple[Axis, ...]] = ("rows",)
    """Each rank has some of the words."""
    name: str
    rows: int
    width: int
    is_partial: bool = False
    """There are tokens beyond it; they have the first row."""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape of its tensor."""
        yield f"{self.name}.weight", (self.rows, self.width)


@dataclass(frozen=True, slots=True)
class Norm:
    """The weight (width,) of an RMSNorm under `NAME.weight`. Source: RMSNorm (arXiv 1910.07467)."""

    may_be_cut: ClassVar[tuple[Axis, ...]] = ("width",)
    name: str
    """Empty: it has no weight, all of it 1."""
    width: int
    eps: float
    offset: float = 0.0
    """Added to the weight as it is stored."""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape of its tensor."""
        if self.name:
            yield f"{self.name}.weight", (self.width,)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """The weight (width,) of a LayerNorm under `NAME.weight`, and perhaps its bias. Source: arXiv 1607.06450."""

    name: str
    width: int
    eps: float
    bias: bool = True
    offset: float = 0.0
    """Added to the weight as it is stored."""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors."""
        yield f"{self.name}.weight", (self.width,)
        if self.bias:
            yield f"{self.name}.bias", (self.width,)


@dataclass(frozen=True, slots=True)
class Vector:
    """Numbers (width,) under `name`, as it is."""

    may_be_cut: ClassVar[tuple[Axis, ...]] = ("width",)
    name: str
    width: int
    as_row: bool = False
    """Stored as a matrix of one row."""
    as_number: bool = False
    """Stored without an axis."""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape of its tensor."""
        yield self.name, () if self.as_number else (1, self.width) if self.as_row else (self.width,)


@dataclass(frozen=True, slots=True)
class Xielu:
    """The numbers of an activation that is a square above 0 and bends like an exponential below.

    With a = softplus(above), b = slope + softplus(below): a * x * x + slope * x, and below 0
    b * (exp(min(x, least)) - 1 - x) + slope * x. Source: arXiv 2411.13010.
    """

    above: Vector
    below: Vector
    slope: Vector
    least: Vector


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A kernel for each channel over its last `taps` tokens under `NAME.weight`, and perhaps `NAME.bias` (channels,).

    Stored as (channels, 1, taps), the newest token's last. Source: Mamba (arXiv 2312.00752).
    """

    may_be_cut: ClassVar[tuple[Axis, ...]] = ("channels",)
    name: str
    channels: int
    taps: int
    bias: bool = False
    exact: bool = False
    """Stored so and not otherwise: other axes would say that the model's other weights are other ones too."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of what it remembers of a row: the inputs before its next token, the oldest first."""
        return (self.taps - 1, self.channels)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors."""
        yield f"{self.name}.weight", (self.channels, 1, self.taps)
        if self.bias:
            yield f"{self.name}.bias", (self.channels,)


@dataclass(frozen=True, slots=True)
class Expert:
    """The weights of one MLP among several."""

    gate_up: Joined
    """Two matrices; of an MLP without a gate the one of `up`."""
    down: Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """MLPs of equal sizes, of which each token takes a few. Source: arXiv 2101.03961."""

    may_be_cut: ClassVar[tuple[Axis, ...]] = ("columns", "experts")
    """Of each expert some columns, or some of the experts."""
    each: tuple[Expert, ...]

    @property
    def gated(self) -> bool:
        """Whether they have a gate; else what goes up is activated by itself."""
        return len(self.each[0].gate_up.parts) > 1

    @property
    def matrices(self) -> Iterator[Joined | Linear]:
        """All of their matrices."""
        for expert in self.each:
            yield expert.gate_up
            yield expert.down

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of their tensors."""
        for matrix in self.matrices:
            yield from matrix.tensors()


@dataclass(frozen=True, slots=True)
class LatentUp:
    """What makes each head's keys and values of a latent. Source: DeepSeek-V2 (arXiv 2405.04434).

    One matrix (heads * (key_dim + value_dim), rank), a head's keys in front of its values.
    """

    may_be_cut: ClassVar[tuple[Axis, ...]] = ("heads",)
    name: str
    heads: int
    key_dim: int
    value_dim: int
    rank: int
    divided: bool = False
    """Stored as two instead, as llama.cpp does: NAME.keys (heads, rank, key_dim), NAME.values (heads, v_dim, rank)."""

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of its tensors."""
        if self.divided:
            yield f"{self.name}.keys.weight", (self.heads, self.rank, self.key_dim)
            yield f"{self.name}.values.weight", (self.heads, self.value_dim, self.rank)
        else:
            yield f"{self.name}.weight", (self.heads * (self.key_dim + self.value_dim), self.rank)


Weight: TypeAlias = Linear | Joined | Embedding | Norm | LayerNorm | Vector | ShortConv | Experts | LatentUp
Matrix: TypeAlias = Linear | Joined | Embedding
"""What a product can be made with."""


def weights_in(declared: object) -> Iterator[Weight]:
    """Every declaration in a dataclass of them, in its tuples and in its dataclasses, in order, each once."""
    yield from dict.fromkeys(_walk(declared))


def _walk(declared: object) -> Iterator[Weight]:
    if isinstance(declared, Weight):
        yield declared
    elif isinstance(declared, tuple):
        for item in declared:
            yield from _walk(item)
    elif dataclasses.is_dataclass(declared):
        for field in dataclasses.fields(declared):
            yield from _walk(getattr(declared, field.name))
