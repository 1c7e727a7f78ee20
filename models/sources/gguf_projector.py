"""The vision tower of a GGUF file in Hugging Face's words: names, values, configuration, processor's files.

How a file holds it is declared by the family, see `models.vision.gguf`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.quantization import Array, Blocks, dequantize
from models.sources.base import JSON, NamedTensor, Tensor, TensorInfo
from models.sources.gguf_blocks import PLAIN, REPACKED, check_kind, read_rows
from models.sources.gguf_header import GGUFHeader, GGUFTensor
from models.vision.gguf import PROJECTOR, Config, Made, ProjectorLayout, Tokens

_PARTS = ("v.", "mm.")
"""What the names of a tower's tensors begin with in a text model's file."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor by its Hugging Face name."""

    name: str
    pieces: tuple[GGUFTensor, ...]
    made: Made | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        if self.made is None:
            return first
        axis, count = self.made.axis, len(self.pieces)
        if within := self.made.within:
            return (first[0] // within, within, *first[1:])
        if self.made.stacked:
            return (*first[:axis], count, *first[axis:])
        return (*first[:axis], sum(piece.shape[axis] for piece in self.pieces), *first[axis + 1 :])

    @property
    def is_quantized(self) -> bool:
        """Blocks as they are: of one format, and a matrix's rows one behind the other."""
        kinds = {piece.kind for piece in self.pieces}
        return len(kinds) == 1 and not kinds & set(PLAIN) and len(self.shape) == 2


class Projector:
    """A tower that a GGUF file holds. Thread: any."""

    def __init__(self, header: GGUFHeader, metadata: GGUFMetadata, layout: ProjectorLayout) -> None:
        self._header = header
        self._metadata = metadata
        self._layout = layout

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors as stored."""
        return sum(piece.nbytes for part in self._parts for piece in part.pieces)

    def check(self, text: GGUFMetadata) -> None:
        """See that it goes with a text model.

        Raises:
            CheckpointError: it is the projector of another.
        """
        name, axis = self._layout.width
        shape = self._metadata.shapes.get(name, ())
        if axis >= len(shape):
            raise CheckpointError("is missing or no matrix", file=self._metadata.file, tensor=name)
        width = text.count("embedding_length")
        if text.arch not in self._layout.texts or shape[axis] != width:
            raise CheckpointError(
                f"is the projector of another model: it is for {' or '.join(self._layout.texts)} with a width of "
                f"{shape[axis]}, and {text.file} is {text.arch} with a width of {width}",
                file=self._metadata.file,
            )

    def config(self, text: Mapping[str, JSON], tokens: Tokens) -> Config:
        """The config.json of the whole model, from that of its text model.

        Raises:
            CheckpointError: the metadata lacks something, or holds impossible values.
        """
        kept = ("gguf_architecture", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id")
        whole: Config = {key: text[key] for key in kept if key in text}
        said = {key: value for key, value in self._layout.config(self._metadata, tokens).items() if value is not None}
        named: Config = {"architectures": [self._layout.hf], "model_type": self._layout.model_type}
        return whole | named | {"text_config": self._layout.text(text)} | said

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """The processor's files by name. Raises CheckpointError."""
        return {name: json.dumps(content).encode() for name, content in self._layout.files(self._metadata).items()}

    def infos(self) -> Iterator[TensorInfo]:
        """See `Checkpoint.infos`."""
        for part in self._parts:
            kind = part.pieces[0].kind
            yield TensorInfo(
                part.name,
                part.shape,
                sum(piece.nbytes for piece in part.pieces),
                quantized=part.is_quantized,
                file=str(part.pieces[0].path),
                kind=kind.name,
                spec=REPACKED.get(kind) if part.is_quantized else None,
            )

    def tensors(self) -> Iterator[NamedTensor]:
        """See `Checkpoint.tensors`."""
        for part in self._parts:
            yield NamedTensor(part.name, partial(self._value, part), str(part.pieces[0].path))

    @cached_property
    def _parts(self) -> Sequence[_Part]:
        is_alone = self._metadata.arch == PROJECTOR
        own = {name: each for name, each in self._header.tensors.items() if is_alone or name.startswith(_PARTS)}
        parts = []
        for name, tensor in own.items():
            check_kind(tensor)
            if (known := self._layout.hf_name(name, self._metadata)) is not None:
                parts.append(_Part(known, (tensor,)))
        for name, (made, pieces) in self._layout.made_in(self._metadata).items():
            parts.append(_Part(name, tuple(self._piece(piece, pieces[0]) for piece in pieces), made))
        return parts

    def _piece(self, name: str, first: str) -> GGUFTensor:
        """One of several, which have the first one's axes."""
        tensor, shape = self._header.tensors.get(name), self._metadata.shapes.get(first, ())
        if tensor is None or len(tensor.shape) != len(shape):
            reason = "is missing" if tensor is None else f"its shape {list(tensor.shape)} does not go with {first}"
            raise CheckpointError(reason, file=self._metadata.file, tensor=name)
        return tensor

    def _value(self, part: _Part) -> Tensor:
        if part.made is None:
            return self._alone(part.pieces[0])
        values = [self._alone(piece) for piece in part.pieces]
        blocks = [value for value in values if isinstance(value, Blocks)]
        if part.is_quantized and part.made.axis == 0 and len(blocks) == len(values):
            return Blocks(np.concatenate([each.rows for each in blocks]), blocks[0].kind, part.shape)
        if part.made.within:
            return _dense(values[0]).reshape(part.shape)
        join = np.stack if part.made.stacked else np.concatenate
        return join([_dense(value) for value in values], axis=part.made.axis)

    def _alone(self, tensor: GGUFTensor) -> Tensor:
        rows = read_rows(tensor)
        stem = tensor.name.removesuffix(".weight").removesuffix(".bias")
        if stem.rpartition(".")[2] in self._layout.interleaved:
            rows = self._in_halves(rows.reshape(tensor.shape[0], -1), tensor).reshape(rows.shape)
        if tensor.kind not in PLAIN:
            return Blocks(rows, tensor.kind, tensor.shape)
        value: Array = rows.view(PLAIN[tensor.kind]).reshape(tensor.shape)
        if tensor.name in self._layout.norms:
            return value.astype(np.float32) - np.float32(1)
        return value

    def _in_halves(self, rows: npt.NDArray[np.uint8], tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """Undo the interleaving of each head's two halves. Shapes: (heads * d, bytes of a row) both ways."""
        heads = self._metadata.count("vision.attention.head_count")
        if len(rows) % (2 * heads):
            raise CheckpointError(
                f"{len(rows)} rows do not divide into {heads} heads", file=str(tensor.path), tensor=tensor.name
            )
        order = np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return rows[order]


def _dense(value: Tensor) -> Array:
    if isinstance(value, Blocks):
        return dequantize(value)
    assert isinstance(value, np.ndarray)
    dense: Array = value.astype(np.float32) if value.dtype != np.float16 else value
    return dense
