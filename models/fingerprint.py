"""What tells a model's numbers from another's without reading its weights, or with a look at each."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from models.checkpoint import Checkpoint
from models.quantization import Array, Blocks, Packed, Tensor

_LOOKS, _LOOK_BYTES = 4, 64


def fingerprint(checkpoint: Checkpoint, *form: str) -> str:
    """A digest of the checkpoint's configuration and files, and of `form`: how its weights are held and computed with.

    A file is known by path, size and time; a blob of the Ollama store by its name, which is a digest. Thread: any.

    Raises:
        ModelError: a header cannot be read.
    """
    files = sorted({info.file for info in checkpoint.infos()})
    described = [checkpoint.config, [_described(file) for file in files], form]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _described(file: str) -> list[str | int]:
    try:
        stat = Path(file).stat()
    except OSError:
        # A label: the path of a blob and the name of the tensor in it.
        return [file]
    return [file, stat.st_size, stat.st_mtime_ns]


def digests(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Of a model's configuration, of its tensors' names and shapes, and of some bytes of each; alike on all machines.

    It does not matter where the files are nor how the tensors are divided among them. Of each array are looked at
    the beginning, the end and two places between; what differs nowhere there is not noticed. Thread: any.

    Raises:
        ModelError: a file cannot be read.
    """
    shapes = sorted([info.name, list(info.shape), info.kind] for info in checkpoint.infos())
    values = hashlib.sha256()
    for tensor in sorted(checkpoint.tensors(), key=lambda each: each.name):
        value = tensor.value if tensor.mapped is None else tensor.mapped().value
        for array in _arrays(value):
            flat = array.reshape(-1).view(np.uint8)
            last = max(flat.size - _LOOK_BYTES, 0)
            for look in range(_LOOKS):
                begin = last * look // (_LOOKS - 1)
                values.update(flat[begin : begin + _LOOK_BYTES].tobytes())
    described = {"configuration": checkpoint.config, "tensors": shapes}
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in described.items()
    } | {"weights": values.hexdigest()}


def _arrays(value: Tensor) -> Iterator[Array]:
    match value:
        case Packed():
            yield from (array for array in (value.weight, value.scales, value.biases) if array is not None)
        case Blocks():
            yield value.rows
        case _:
            yield value
