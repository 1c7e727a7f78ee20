"""A writer of small GGUF files, and a checkpoint of what is read from one."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

GGUFWrite = Callable[..., Path]

HYPERPARAMETERS: Mapping[str, int | float] = {
    "embedding_length": 64,
    "block_count": 1,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "feed_forward_length": 96,
    "context_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


class Files:
    """A checkpoint that has nothing but files."""

    reference = "test"
    nbytes = 0

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.config: dict[str, object] = {}

    def read(self, name: str) -> bytes | None:
        return self.files.get(name)


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


@pytest.fixture
def write_gguf(tmp_path: Path) -> GGUFWrite:
    """Writes arrays, and (bytes, type) pairs for block formats, with the metadata of a small model of `arch`."""

    def write(
        tensors: Mapping[str, object],
        metadata: Mapping[str, object] | None = None,
        *,
        arch: str = "llama",
        name: str = "m.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(str(path), arch)
        own = {f"{arch}.{key}": value for key, value in HYPERPARAMETERS.items()} | dict(metadata or {})
        for key, value in own.items():
            if value is not None:
                add_value(writer, key, value)
        for tensor, value in ({"token_embd.weight": np.zeros((10, 64), np.float32)} | dict(tensors)).items():
            if isinstance(value, tuple):
                rows, kind = value
                writer.add_tensor(tensor, rows, raw_dtype=kind)
            elif isinstance(value, np.ndarray):
                writer.add_tensor(tensor, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
