"""A GGUF file as a checkpoint: names, configuration, tokenizer and the order of rows translated to Hugging Face's.

A model may be split over several files, `NAME-00001-of-00003.gguf` and so on; any of them stands for all.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.arch import GGUFLayout, gguf_layout
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.quantization import Array, Blocks, dequantize
from models.sources.base import JSON, Mapped, NamedTensor, Tensor, TensorInfo
from models.sources.gguf_blocks import PLAIN, REPACKED, check_kind, map_rows, read_rows
from models.sources.gguf_config import hf_config, hf_name, stem_in_layer, unpermuted_rows
from models.sources.gguf_header import GGUFHeader, GGUFTensor, read_header
from models.sources.gguf_tokenizer import tokenizer_files

# Matrices of one row, whose axis of one some converters drop.
_ROWS = ("token_types.weight", "ffn_gate_inp_shexp.weight")
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


class GGUFFile:
    """A GGUF file as a checkpoint (see `Checkpoint`)."""

    def __init__(self, path: Path, reference: str) -> None:
        self._path = path
        self.reference = reference
        self._label = str(path)

    @cached_property
    def header(self) -> GGUFHeader:
        """Of all parts together. Raises CheckpointError."""
        header = read_header(self._path)
        count = header.metadata.get("split.count", 1)
        if count in (0, 1):
            return header
        match = _SPLIT.fullmatch(self._path.name)
        if match is None or not isinstance(count, int) or int(match[2]) != count:
            raise CheckpointError(
                f"is one of {count} parts of a model, and not called NAME-00001-of-{count:05}.gguf, so the others "
                "cannot be found; merge them with llama-gguf-split --merge",
                file=self._label,
            )
        paths = [self._path.with_name(f"{match[1]}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
        parts = [read_header(path) for path in paths]
        tensors: dict[str, GGUFTensor] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if name in tensors:
                    raise CheckpointError(f"is in {tensors[name].path} as well", file=str(tensor.path), tensor=name)
                tensors[name] = tensor
        return GGUFHeader(parts[0].metadata, tensors)

    @cached_property
    def metadata(self) -> GGUFMetadata:
        """Of its architecture. Raises CheckpointError."""
        shapes = {name: tensor.shape for name, tensor in self.header.tensors.items()}
        return GGUFMetadata(self.header.metadata, shapes, self._floats, self._label)

    @cached_property
    def _layout(self) -> GGUFLayout | None:
        return gguf_layout(self.metadata)

    @cached_property
    def config(self) -> Mapping[str, JSON]:
        """See `Checkpoint.config`. GGUF's own name of the architecture is under `gguf_architecture`."""
        return hf_config(self.header, self.metadata, self._layout)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.header.tensors.values())

    @cached_property
    def _files(self) -> Mapping[str, bytes]:
        files = {"config.json": json.dumps(self.config).encode()}
        return files | tokenizer_files(self.header.metadata)

    def read(self, name: str) -> bytes | None:
        """A file that a Hugging Face folder of the model would have, made from the metadata.

        Raises:
            TokenizerError: the metadata holds no vocabulary that can be rebuilt.
        """
        return self._files.get(name)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text; None: the vocabulary has none of that text."""
        tokens = self.header.metadata.get("tokenizer.ggml.tokens")
        return tokens.index(token) if isinstance(tokens, list) and token in tokens else None

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        """See `Checkpoint.infos`."""
        for name, number in self._numbers(component).items():
            yield TensorInfo(name, number.shape, number.nbytes, quantized=False, file=self._label, kind="F32")
        for name, tensor in self._named(component):
            quantized = tensor.kind not in PLAIN and len(tensor.shape) > 1
            yield TensorInfo(
                name,
                tensor.shape,
                tensor.nbytes,
                quantized=quantized,
                file=str(tensor.path),
                kind=tensor.kind.name,
                spec=REPACKED.get(tensor.kind) if quantized else None,
            )

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """See `Checkpoint.tensors`. Values are `Blocks`, but for plain types and for vectors."""
        for name, number in self._numbers(component).items():
            yield NamedTensor(name, number.copy, self._label)
        for name, tensor in self._named(component):
            mapped = partial(self._mapped, tensor) if len(tensor.shape) > 1 else None
            yield NamedTensor(name, partial(self._value, tensor), str(tensor.path), *self._divided(tensor), mapped)

    def _numbers(self, component: str) -> Mapping[str, Array]:
        """Tensors that the file has among its metadata."""
        return {} if component or self._layout is None else self._layout.numbers(self.metadata)

    def _named(self, component: str) -> Iterator[tuple[str, GGUFTensor]]:
        if component:
            yield self._dense(component)
            return
        for tensor in self.header.tensors.values():
            name = hf_name(tensor.name, self._layout)
            if tensor.name.endswith(_ROWS) and len(tensor.shape) == 1:
                tensor = replace(tensor, shape=(1, *tensor.shape))  # noqa: PLW2901
            if name is not None:
                check_kind(tensor)
                yield name, tensor

    def _dense(self, component: str) -> tuple[str, GGUFTensor]:
        """The matrix behind pooling that is a component of that name."""
        tensor = self.header.tensors.get(f"{component}.weight")
        if self._layout is None or component not in self._layout.dense or tensor is None:
            raise CheckpointError(f"a GGUF file has no component {component!r}", file=self._label)
        check_kind(tensor)
        return "linear.weight", tensor

    def _floats(self, name: str) -> list[float] | None:
        """The values of a tensor of one dimension; None where there is none. Raises CheckpointError."""
        tensor = self.header.tensors.get(name)
        if tensor is None or len(tensor.shape) != 1:
            return None
        check_kind(tensor)
        return [float(value) for value in _vector(tensor)]

    def _value(self, tensor: GGUFTensor) -> Tensor:
        if self._layout is not None and stem_in_layer(tensor.name) in self._layout.rates:
            return np.log(-_vector(tensor).astype(np.float32))
        if len(tensor.shape) == 1:
            vector = _vector(tensor)
            if self._layout is not None and self._layout.norm_shift and tensor.name.endswith("norm.weight"):
                vector = vector.astype(np.float32) - np.float32(self._layout.norm_shift)
            order = self._order(tensor, len(vector))
            return vector if order is None else vector[order]
        rows = read_rows(tensor)
        order = self._order(tensor, len(rows))
        return _matrix(rows if order is None else rows[order], tensor)

    def _mapped(self, tensor: GGUFTensor) -> Mapped:
        """A view of a tensor of several dimensions, as `_value` has it."""
        if self._layout is not None and stem_in_layer(tensor.name) in self._layout.rates:
            return Mapped(self._value(tensor))
        rows = map_rows(tensor)
        return Mapped(_matrix(rows, tensor), self._order(tensor, len(rows)))

    def _divided(self, tensor: GGUFTensor) -> tuple[Callable[[int], Tensor] | None, int]:
        return (partial(self._entry, tensor), tensor.shape[0]) if len(tensor.shape) > 1 else (None, 0)

    def _entry(self, tensor: GGUFTensor, index: int) -> Tensor:
        return self._value(tensor.entry(index))

    def _order(self, tensor: GGUFTensor, rows: int) -> npt.NDArray[np.intp] | None:
        return unpermuted_rows(tensor.name, rows, self._layout, self.config, str(tensor.path))


def _matrix(rows: npt.NDArray[np.uint8], tensor: GGUFTensor) -> Tensor:
    if tensor.kind in PLAIN:
        return rows.view(PLAIN[tensor.kind]).reshape(tensor.shape)
    return Blocks(rows, tensor.kind, tensor.shape)


def _vector(tensor: GGUFTensor) -> Array:
    """A tensor of one dimension, dense. Raises CheckpointError."""
    rows = read_rows(tensor)
    if tensor.kind in PLAIN:
        return rows.view(PLAIN[tensor.kind]).reshape(tensor.shape)
    return dequantize(Blocks(rows, tensor.kind, tensor.shape))
