import json
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from models.errors import CheckpointError
from models.sources.safetensors_file import open_safetensors


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_file_that_mlx_wrote_is_read_with_its_metadata(file: Path):
    mx.save_safetensors(str(file), {"a": mx.ones((2, 3), mx.bfloat16), "b": mx.array(3)}, {"k": "v"})
    opened = open_safetensors(file, "m")
    assert opened.metadata["k"] == "v"
    assert (opened.tensors["a"].dtype, opened.tensors["a"].shape, opened.tensors["a"].nbytes) == ("BF16", (2, 3), 12)
    array = opened.array(opened.tensors["a"])
    assert array.dtype == ml_dtypes.bfloat16
    assert array.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert opened.array(opened.tensors["b"]).shape == ()


@pytest.mark.parametrize("cut", [0, 4, 7, 8, 20, -1])
def test_a_file_cut_anywhere_is_refused_before_its_data_is_read(file: Path, cut: int):
    mx.save_safetensors(str(file), {"a": mx.ones((64,))})
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"truncated|not a safetensors"):
        open_safetensors(file, "shard-1")


def test_the_error_of_a_cut_file_names_file_and_tensor(file: Path):
    write(file, {"x.weight": entry(0, 16, [4])}, bytes(15))
    with pytest.raises(CheckpointError, match=r"shard-1: tensor x\.weight: the file is truncated") as caught:
        open_safetensors(file, "shard-1")
    assert (caught.value.file, caught.value.tensor) == ("shard-1", "x.weight")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"\xff\xfe garbage", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "not an object"),
        ({"__metadata__": [1]}, "metadata"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "malformed"),
        ({"a": entry(0, 4, [-1])}, "malformed"),
        ({"a": entry(4, 0, [1])}, "malformed"),
        ({"a": entry(-4, 0, [1])}, "malformed"),
        ({"a": entry(0, 4, [2**40])}, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}, "malformed"),
        ({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, "malformed"),
        ({"a": entry(0, 8, [1])}, "8 bytes are stored, but F32"),
        ({"a": entry(0, 4, [1], "Q9")}, "unknown"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "overlaps"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(file: Path, header: object, reason: str):
    write(file, header, bytes(64))
    with pytest.raises(CheckpointError, match=reason):
        open_safetensors(file, "m")


def test_a_header_length_of_garbage_is_refused(file: Path):
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_safetensors(file, "m")


def test_a_missing_file_says_so(file: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        open_safetensors(file, "m")


def test_a_type_that_is_not_read_is_refused_by_name(file: Path):
    write(file, {"a": entry(0, 8, [1], "F64")}, bytes(8))
    opened = open_safetensors(file, "m")
    with pytest.raises(CheckpointError, match="tensor a: its type F64"):
        opened.array(opened.tensors["a"])


def test_a_file_that_changed_after_it_was_opened_is_not_read(file: Path):
    mx.save_safetensors(str(file), {"a": mx.ones((64,))})
    opened = open_safetensors(file, "m")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"m: tensor a: .*changed since it was opened"):
        opened.array(opened.tensors["a"])
    file.unlink()
    with pytest.raises(CheckpointError, match="m: tensor a: cannot be read"):
        opened.array(opened.tensors["a"])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (mx.float32, np.float32), (mx.float16, np.float16), (mx.bfloat16, ml_dtypes.bfloat16), (mx.uint32, np.uint32),
        (mx.int64, np.int64), (mx.uint8, np.uint8), (mx.int8, np.int8), (mx.bool_, np.bool_), (mx.uint16, np.uint16),
    ],
)  # fmt: skip
def test_every_type_is_numpys_own(file: Path, dtype: mx.Dtype, expected: type):
    mx.save_safetensors(str(file), {"first": mx.ones(3), "a": mx.array([0, 1, 1, 0, 1, 0]).reshape(2, 3).astype(dtype)})
    opened = open_safetensors(file, "m")
    array = opened.array(opened.tensors["a"])
    assert array.dtype == np.dtype(expected)
    assert array.astype(np.float32).tolist() == [[0, 1, 1], [0, 1, 0]]
