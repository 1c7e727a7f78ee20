"""A GGUF file as a checkpoint: names, configuration, tokenizer and the order of rows translated to Hugging Face's.

A model may be split over several files, `NAME-00001-of-00003.gguf` and so on; any of them stands for all.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from models.errors import CheckpointError
from models.quantization import Packed, packed_nbytes
from models.sources.base import JSON, NamedTensor, Tensor, TensorInfo
from models.sources.gguf_blocks import PLAIN, REPACKED, check_kind, floats, read_rows, repack
from models.sources.gguf_config import hf_config, hf_name, unpermuted_rows
from models.sources.gguf_header import GGUFHeader, GGUFTensor, read_header
from models.sources.gguf_tokenizer import tokenizer_files

_ROPE_FACTORS = "rope_freqs.weight"
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


class GGUFFile:
    """A GGUF file as a checkpoint (see `Checkpoint`)."""

    def __init__(self, path: Path, reference: str) -> None:
        self._path = path
        self.reference = reference
        self._label = str(path)

    @cached_property
    def _header(self) -> GGUFHeader:
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
    def config(self) -> Mapping[str, JSON]:
        """See `Checkpoint.config`. GGUF's own name of the architecture is under `gguf_architecture`."""
        tensor = self._header.tensors.get(_ROPE_FACTORS)
        factors = None
        if tensor is not None:
            check_kind(tensor)
            factors = [float(value) for value in floats(read_rows(tensor), tensor.kind).reshape(-1)]
        return hf_config(self._header, factors, self._label)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self._header.tensors.values())

    @cached_property
    def _files(self) -> Mapping[str, bytes]:
        files = {"config.json": json.dumps(self.config).encode()}
        return files | tokenizer_files(self._header.metadata)

    def read(self, name: str) -> bytes | None:
        """A file that a Hugging Face folder of the model would have, made from the metadata.

        Raises:
            TokenizerError: the metadata holds no vocabulary that can be rebuilt.
        """
        return self._files.get(name)

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        """See `Checkpoint.infos`."""
        for name, tensor in self._named(component):
            spec = REPACKED.get(tensor.kind) if len(tensor.shape) > 1 else None
            if spec is not None:
                nbytes = packed_nbytes(spec, tensor.shape, scale_itemsize=2)
            else:
                nbytes = tensor.nbytes if tensor.kind in PLAIN else math.prod(tensor.shape) * 4
            yield TensorInfo(name, tensor.shape, nbytes, quantized=spec is not None, file=str(tensor.path), spec=spec)

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """See `Checkpoint.tensors`. Each tensor is read when its turn comes."""
        for name, tensor in self._named(component):
            yield NamedTensor(name, self._value(tensor), str(tensor.path))

    def _named(self, component: str) -> Iterator[tuple[str, GGUFTensor]]:
        if component:
            raise CheckpointError(f"a GGUF file has no component {component!r}", file=self._label)
        for tensor in self._header.tensors.values():
            name = hf_name(tensor.name)
            if name is not None:
                check_kind(tensor)
                yield name, tensor

    def _value(self, tensor: GGUFTensor) -> Tensor:
        rows = read_rows(tensor)
        vector = len(tensor.shape) == 1
        if vector:
            # A row a value: then a bias is reordered as the rows of its matrix are.
            rows = rows.reshape(tensor.shape[0], -1) if tensor.kind in PLAIN else rows
        order = unpermuted_rows(tensor.name, rows.shape[0], self.config, str(tensor.path))
        if order is not None:
            rows = rows[order]
        if tensor.kind in PLAIN:
            values = mx.array(np.ascontiguousarray(rows).view(PLAIN[tensor.kind]).reshape(tensor.shape))
            return values.view(mx.bfloat16) if tensor.kind.name == "BF16" else values
        packed = repack(rows, tensor.kind) if tensor.kind in REPACKED and not vector else None
        if packed is None:
            return mx.array(floats(rows, tensor.kind).reshape(tensor.shape))
        head = tensor.shape[:-1]
        return Packed(
            mx.array(packed.weight.reshape(*head, -1)),
            mx.array(packed.scales.reshape(*head, -1)),
            mx.array(packed.biases.reshape(*head, -1)),
            REPACKED[tensor.kind],
        )
