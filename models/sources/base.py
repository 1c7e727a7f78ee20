"""The language that every source speaks: names, shapes and values of stored tensors, and the checkpoint as a protocol.

`models.checkpoint` is where the rest of the package imports these from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import mlx.core as mx

from models.quantization import Packed, QuantizationSpec

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

Tensor: TypeAlias = mx.array | Packed


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One tensor of a checkpoint: its Hugging Face name, its value (lazy where the format allows) and its file."""

    name: str
    value: Tensor
    file: str


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the headers say of one tensor, known without reading its data: for memory plans.

    `shape` is the logical one; `nbytes` are the bytes of the value that `tensors()` yields (a GGUF block format that
    MLX has no kernel for is yielded as float32, so it can be more than the file holds); `spec` is set if it is
    quantised.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    quantized: bool
    file: str
    spec: QuantizationSpec | None = None


class Checkpoint(Protocol):
    """A model's files, opened but not read.

    Thread: `config`, `read`, `infos` and `nbytes` may be used in any thread; `tensors` makes MLX arrays and belongs to
    the MLX thread.
    """

    @property
    def reference(self) -> str:
        """What the user named, for messages."""
        ...

    @property
    def config(self) -> Mapping[str, JSON]:
        """The model's `config.json` (for a pipeline: `model_index.json`)."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as stored."""
        ...

    def read(self, name: str) -> bytes | None:
        """A configuration file by its path in a Hugging Face folder (`tokenizer.json`), or None if there is none."""
        ...

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        """The tensors of one component, by their headers alone.

        Raises:
            CheckpointError: a header is damaged or a file is shorter than its header says.
            QuantizationError: a tensor is quantised in an unknown way.
        """
        ...

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """The tensors of one component, in no particular order.

        Raises:
            CheckpointError: a file is missing, truncated or malformed.
            QuantizationError: a tensor is quantised in an unknown way.
        """
        ...
