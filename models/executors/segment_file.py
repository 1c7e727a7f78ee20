"""A segment's arrays in the words of a safetensors file: names, types, shapes and bytes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from models.executors.base import Checkpoint, HostArray, Segment
from models.sources.safetensors_file import StoredTensor

_TYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1", "U16": "<u2", "U32": "<u4", "I32": "<i4"}
_NAMES = {np.dtype(text): name for name, text in _TYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of a file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def stored(segment: Segment | Checkpoint) -> Iterator[StoredArray]:
    """A segment's arrays. Waits for them. Thread: the executor's."""
    for key, array in segment.arrays():
        yield StoredArray(key, _NAMES[array.dtype], array.shape, np.ascontiguousarray(array).tobytes())


def arrays(entries: Iterable[StoredTensor], data: memoryview, begin: int) -> Mapping[str, HostArray]:
    """The arrays of a file whose data begins at `begin`. Thread: any.

    Raises:
        ValueError: one is of a type that no segment has.
    """
    found: dict[str, HostArray] = {}
    for entry in entries:
        if entry.dtype not in _TYPES:
            raise ValueError(f"no segment has an array of type {entry.dtype}, as {entry.key} is")
        start = entry.begin - begin
        flat = np.frombuffer(data[start : start + entry.nbytes], _TYPES[entry.dtype])
        found[entry.key] = flat.reshape(entry.shape)
    return found
