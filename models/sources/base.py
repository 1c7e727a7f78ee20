"""The language that every source speaks: names, shapes and values of stored tensors, and the checkpoint as a protocol.

`models.checkpoint` is where the rest of the package imports these from.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from models.config_reader import JSON
from models.quantization import QuantizationSpec, Tensor

__all__ = ["JSON", "Checkpoint", "NamedTensor", "Tensor", "TensorInfo"]


@dataclass(frozen=True, slots=True)
class Mapped:
    """A tensor whose arrays are views of a file: what nobody takes out of them is not read."""

    value: Tensor
    order: npt.NDArray[np.intp] | None = None
    """Its rows come in this order; None: as they are."""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One tensor of a checkpoint: its Hugging Face name, how to read it, and its file."""

    name: str
    read: Callable[[], Tensor]
    file: str
    read_entry: Callable[[int], Tensor] | None = None
    """Reads one entry of the first axis alone; None: there is none."""
    entries: int = 0
    """Those of the first axis."""
    mapped: Callable[[], Mapped] | None = None
    """Opens it without reading it; None: it has to be read to be looked at."""

    @property
    def value(self) -> Tensor:
        """The value, read anew each time that it is asked for; nothing keeps it. Thread: any.

        Raises:
            CheckpointError: the file is missing, has changed or cannot be read.
        """
        return self.read()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the headers say of one tensor, known without reading its data: for memory plans.

    `shape` is the logical one; `nbytes` are the bytes as stored. `kind` is what the file calls the type: of a dense
    tensor `F32`, `BF16` and so on, of a quantised one MLX's mode (`affine`, `mxfp4`) or GGML's block format (`Q4_K`).
    `spec` is set where MLX's layout can hold the matrix exactly: that of MLX's own kinds, and of some block formats.
    `mapped` opens the tensor without reading it where headers do not tell how it can be held; None where they do.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    quantized: bool
    file: str
    kind: str
    spec: QuantizationSpec | None = None
    mapped: Callable[[], Mapped] | None = field(default=None, compare=False, repr=False)


class Checkpoint(Protocol):
    """A model's files, opened but not read.

    Thread: any.
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
        """The tensors of one component, in no particular order; nothing but headers is read before a value is asked.

        Raises:
            CheckpointError: a file is missing, truncated or malformed.
            QuantizationError: a tensor is quantised in an unknown way.
        """
        ...
