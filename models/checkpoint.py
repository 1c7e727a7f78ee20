"""The checkpoint as the rest of the package sees it, whatever files it comes from.

Every source (Hugging Face folder, Ollama store, GGUF file) presents itself in one language: Hugging Face names for
tensors, Hugging Face keys in the configuration, Hugging Face files for tokenizer and generation settings. A source that
is not made of such files (GGUF) translates; nothing outside `models.sources` knows that there was anything to translate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import mlx.core as mx

from models.quantization import QuantizationSpec

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised matrix in MLX's packed layout.

    Shapes: weight uint32 (..., out, in * bits / 32); scales (..., out, in / group_size), floating for affine and uint8 for
    the others; biases like scales (affine's zero point, never the layer's bias) or None.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    spec: QuantizationSpec


Tensor: TypeAlias = mx.array | Packed


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One tensor of a checkpoint: its Hugging Face name, its value (lazy where the format allows) and its file."""

    name: str
    value: Tensor
    file: str


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the headers say of one tensor, known without reading its data: for memory plans. Shape is the logical one."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    quantized: bool
    file: str


class Checkpoint(Protocol):
    """A model's files, opened but not read.

    Thread: `config`, `read`, `infos` and `nbytes` may be used in any thread; `tensors` makes MLX arrays and belongs to the
    MLX thread.
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
        """
        ...

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """The tensors of one component, in no particular order.

        Raises:
            CheckpointError: a file is missing, truncated or malformed.
            QuantizationError: a tensor is quantised in an unknown way.
        """
        ...


def open_checkpoint(reference: str, store: Path, *, verify_digests: bool = False) -> Checkpoint:
    """Open what `reference` names: a Hugging Face folder, a GGUF file or blob, or a model of the Ollama store.

    A path that exists is taken as a path; anything else is a name in `store`.

    Raises:
        ModelNotFoundError: nothing is there; the message lists what was tried.
        CheckpointError: it is there but cannot be read.
    """
    raise NotImplementedError
