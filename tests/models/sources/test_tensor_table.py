from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.errors import CheckpointError, QuantizationError
from models.quantization import Packed, QuantizationSpec
from models.sources.safetensors_file import open_safetensors
from models.sources.tensor_table import Member, TensorTable, make_table

INT4 = QuantizationSpec("affine", 4, 32)
NVFP4 = QuantizationSpec("nvfp4", 4, 16)
MATRIX = mx.ones((4, 64))


def table(path: Path, arrays: Mapping[str, mx.array], spec: QuantizationSpec = INT4) -> TensorTable:
    mx.save_safetensors(str(path / "m.safetensors"), dict(arrays))
    file = open_safetensors(path / "m.safetensors", "m")
    members = {name: Member(file, stored) for name, stored in file.tensors.items()}
    return make_table(members, lambda *_: spec)


def parts(spec: QuantizationSpec, names: tuple[str, ...]) -> dict[str, mx.array]:
    return dict(zip(names, mx.quantize(MATRIX, spec.group_size, spec.bits, spec.mode), strict=False))


@pytest.mark.parametrize(
    "names",
    [
        ("l.weight", "l.scales", "l.biases"),
        ("l.weight", "l.weight.scale", "l.weight.bias"),
        ("l.weight", "l.weight_scale", "l.weight_qbias"),
        ("experts.up", "experts.up.scale", "experts.up.bias"),
    ],
)
def test_each_naming_of_the_parts_makes_one_matrix(tmp_path: Path, names: tuple[str, ...]):
    (tensor,) = table(tmp_path, parts(INT4, names)).tensors()
    assert tensor.name == names[0]
    value = tensor.value
    assert isinstance(value, Packed)
    assert value.biases is not None


def test_names_that_only_look_like_parts_stay_tensors(tmp_path: Path):
    arrays = {"l.weight": MATRIX, "l.weight_scale": mx.ones(1), "l.bias": mx.ones(4), "l.scale": mx.ones(4)}
    assert {info.name for info in table(tmp_path, arrays).infos()} == set(arrays)


@pytest.mark.parametrize(
    ("change", "spec", "reason"),
    [
        ({"l.biases": mx.ones((4, 1))}, INT4, "floating scales and biases of one shape"),
        ({"l.scales": mx.ones((4, 2), mx.uint8)}, INT4, "floating scales and biases of one shape"),
        ({"l.scales": mx.ones((4, 3))}, INT4, r"scales \[4, 3\] do not make affine with 4 bits in groups of 32"),
        ({"l.scales": mx.ones((4, 4), mx.uint8)}, NVFP4, "no biases"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    tmp_path: Path, change: dict[str, mx.array], spec: QuantizationSpec, reason: str
):
    with pytest.raises(CheckpointError, match=f"m: tensor l.weight: .*{reason}"):
        table(tmp_path, parts(INT4, ("l.weight", "l.scales", "l.biases")) | change, spec)


@pytest.mark.parametrize("scale", [mx.ones(2), mx.ones(1, mx.int32)])
def test_a_global_scale_is_one_floating_number(tmp_path: Path, scale: mx.array):
    arrays = parts(NVFP4, ("l.weight", "l.weight.scale")) | {"l.weight.global_scale": scale}
    with pytest.raises(CheckpointError, match="its global scale is not one floating number"):
        table(tmp_path, arrays, NVFP4)


def test_a_packed_matrix_without_scales_is_refused(tmp_path: Path):
    with pytest.raises(QuantizationError, match=r"l\.weight is stored as U32 without scales"):
        table(tmp_path, {"l.weight": mx.ones((4, 8), mx.uint32)})


def test_whole_numbers_that_are_no_weights_are_read(tmp_path: Path):
    (tensor,) = table(tmp_path, {"position_ids": mx.arange(4).reshape(1, 4)}).tensors()
    assert isinstance(tensor.value, np.ndarray)
    assert tensor.value.tolist() == [[0, 1, 2, 3]]
