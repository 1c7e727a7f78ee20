import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from models.errors import CheckpointError
from models.sources.gguf_header import is_gguf, read_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def entry(name: str = "t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def test_values_of_every_type_come_back(write_gguf):
    metadata = {"a": True, "b": 7, "c": 1e-5, "d": "text", "e": [1, 2], "f": ["x", "y"], "g": [0.5]}
    found = read_header(write_gguf({}, metadata)).metadata
    assert {key: found[key] for key in metadata} == metadata


def test_shapes_are_rows_first(write_gguf):
    tensor = read_header(write_gguf({"t": np.arange(6, dtype=np.float32).reshape(2, 3)})).tensors["t"]
    assert (tensor.kind, tensor.shape, tensor.nbytes) == (Kind.F32, (2, 3), 24)
    data = np.fromfile(tensor.path, np.float32, 6, offset=tensor.offset)
    assert data.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_cut_anywhere_is_refused(write_gguf):
    path = write_gguf({"t": np.ones((4, 64), np.float32)}, {"x": ["a", "b"]})
    whole = path.read_bytes()
    # The header byte by byte, then the data; the file ends in padding that may be absent.
    for length in [*range(700), len(whole) - 33, len(whole) // 2]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf: "):
            read_header(path)


def test_the_error_of_cut_data_names_the_tensor(write_gguf):
    path = write_gguf({"blk.0.ffn_up.weight": np.ones((4, 64), np.float32)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.weight: the file is truncated"):
        read_header(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GGML" + bytes(64), "not a GGUF file"),
        (header(version=1), "version 1"),
        (header(version=0x03000000), "big-endian"),
        (header(pairs=2**60), "truncated"),
        (header(tensors=2**60), "truncated"),
        (header(pairs=1) + struct.pack("<Q", 2**63), "truncated"),
        (header(pairs=1) + text("k") + struct.pack("<I", 99), "unknown type 99"),
        (header(pairs=1) + text("k") + struct.pack("<IIQ", 9, 4, 2**61), "truncated"),
        (header(pairs=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**61), "impossible array"),
        (header(pairs=1) + text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50, "impossible array"),
        (header(pairs=1) + text("general.alignment") + struct.pack("<II", 4, 3), "power of two"),
        (header(tensors=1) + entry(dims=(1,) * 9), "9 dimensions"),
        (header(tensors=1) + entry(dims=()), "0 dimensions"),
        (header(tensors=1) + entry(dims=(32, 0)), r"its shape \[0, 32\] is empty"),
        (header(tensors=1) + entry(kind=77), "tensor t: its type 77 is unknown"),
        (header(tensors=1) + entry(dims=(33,), kind=2), "tensor t: rows of 33 are no multiple of Q4_0"),
        (header(tensors=1) + entry(dims=(2**40, 2**40)), "truncated"),
        (header(tensors=1) + entry(offset=2**62) + bytes(4096), "truncated"),
        (header(tensors=2) + entry() + entry() + bytes(4096), "tensor t: is there twice"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, data: bytes, reason: str):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        read_header(path)


def test_a_string_that_is_not_utf8_keeps_its_bytes(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header(pairs=1) + text("k") + struct.pack("<IQ", 8, 2) + b"\xe2\x96")
    value = read_header(path).metadata["k"]
    assert isinstance(value, str)
    assert value.encode("utf-8", "surrogateescape") == b"\xe2\x96"


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path):
    (tmp_path / "a").write_bytes(header())
    (tmp_path / "b").write_bytes(b"GG")
    assert is_gguf(tmp_path / "a")
    assert not is_gguf(tmp_path / "b")
    with pytest.raises(CheckpointError, match="No such file"):
        is_gguf(tmp_path / "c")
