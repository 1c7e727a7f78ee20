from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.arch.base import Stack
from models.arch.experts import STACKS, stacks_of
from models.arch.gpt_oss import _STACKS as GPT_OSS
from models.errors import CheckpointError
from models.packing import e2m1, e8m0
from models.quantization import Array, QuantizationSpec, dequantize
from models.sources.base import TensorInfo
from models.sources.safetensors_file import open_safetensors
from models.sources.tensor_table import Member, TensorTable, make_table
from models.weights.stacks import separate_infos, separate_tensors

RNG = np.random.default_rng(3)
GATE, UP, DOWN = (RNG.normal(0, 1, shape).astype(np.float32) for shape in ((3, 4, 64), (3, 4, 64), (3, 64, 32)))
INT4 = QuantizationSpec("affine", 4, 32)


def table(path: Path, arrays: dict[str, Array | mx.array], spec: QuantizationSpec = INT4) -> TensorTable:
    mx.save_safetensors(str(path / "m.safetensors"), {name: mx.array(value) for name, value in arrays.items()})
    file = open_safetensors(path / "m.safetensors", "m")
    return make_table({name: Member(file, stored) for name, stored in file.tensors.items()}, lambda *_: spec)


def read(path: Path, arrays: dict[str, Array | mx.array], stacks: tuple[Stack, ...] = STACKS) -> dict[str, np.ndarray]:
    """All values, dense; what the infos say of them is what they are."""
    found = table(path, arrays)
    tensors = {tensor.name: tensor.value for tensor in separate_tensors(found.tensors(), stacks)}
    dense = {name: value if isinstance(value, np.ndarray) else dequantize(value) for name, value in tensors.items()}
    infos = {info.name: info for info in separate_infos(found.infos(), stacks)}
    assert {name: info.shape for name, info in infos.items()} == {name: value.shape for name, value in dense.items()}
    assert all(infos[name].quantized is not isinstance(value, np.ndarray) for name, value in tensors.items())
    return dense


def assert_experts(found: dict[str, np.ndarray], **expected: np.ndarray) -> None:
    names = {f"l.experts.{n}.{name}_proj.weight" for name in expected for n in range(3)}
    assert set(found) == names
    for name, values in expected.items():
        for n in range(3):
            np.testing.assert_array_equal(found[f"l.experts.{n}.{name}_proj.weight"], values[n])


@pytest.mark.parametrize("marker", ["switch_mlp", "experts", "experts.*"])
def test_matrices_stacked_by_projection_come_apart(tmp_path: Path, marker: str):
    found = read(tmp_path, {f"l.{marker}.gate_proj.weight": GATE, f"l.{marker}.down_proj.weight": DOWN})
    assert_experts(found, gate=GATE, down=DOWN)


@pytest.mark.parametrize(
    "name", ["experts.gate_up_proj", "experts.gate_up_proj.weight", "switch_mlp.gate_up_proj.weight"]
)
def test_gate_and_up_in_one_come_apart(tmp_path: Path, name: str):
    assert_experts(read(tmp_path, {f"l.{name}": np.concatenate([GATE, UP], axis=1)}), gate=GATE, up=UP)


def test_quantised_stacks_come_apart_in_the_bits_they_have(tmp_path: Path):
    both = mx.array(np.concatenate([GATE, UP], axis=1))
    words, scales, biases = mx.quantize(both, 32, 4)
    name = "l.switch_mlp.gate_up_proj"
    found = read(tmp_path, {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.biases": biases})
    values = np.array(mx.dequantize(words, scales, biases, 32, 4))
    assert set(found) == {f"l.experts.{n}.{part}_proj.weight" for n in range(3) for part in ("gate", "up")}
    np.testing.assert_allclose(found["l.experts.2.up_proj.weight"], values[2, 4:], rtol=1e-6)


def test_each_expert_has_the_global_scale_that_is_its_own(tmp_path: Path):
    words, scales = mx.quantize(mx.array(DOWN), 16, 4, "nvfp4")
    arrays = {"l.experts.down_proj.weight": words, "l.experts.down_proj.weight.scale": scales}
    factors = {"l.experts.down_proj.weight.global_scale": np.array([1, 2, 4], np.float32)}
    found = table(tmp_path, arrays | factors, QuantizationSpec("nvfp4", 4, 16))
    values = {tensor.name: dequantize(tensor.value) for tensor in separate_tensors(found.tensors(), STACKS)}
    plain = np.array(mx.dequantize(words, scales, None, 16, 4, "nvfp4", dtype=mx.float32))
    for n, factor in enumerate((1, 2, 4)):
        np.testing.assert_allclose(values[f"l.experts.{n}.down_proj.weight"], plain[n] * factor, rtol=1e-6)


def test_openais_mxfp4_is_read_to_the_bit(tmp_path: Path):
    blocks = RNG.integers(0, 256, (3, 8, 2, 16), dtype=np.uint8)
    scales = RNG.integers(120, 130, (3, 8, 2), dtype=np.uint8)
    found = read(tmp_path, {"l.experts.gate_up_proj_blocks": blocks, "l.experts.gate_up_proj_scales": scales}, GPT_OSS)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(3, 8, 2, 32)
    values = (e2m1(codes) * e8m0(scales)[..., None]).reshape(3, 8, 64)
    assert_experts(found, gate=values[:, 0::2], up=values[:, 1::2])


def test_an_experts_exponents_are_seen_without_reading_it(tmp_path: Path):
    blocks = RNG.integers(0, 256, (3, 8, 2, 16), dtype=np.uint8)
    scales = RNG.integers(120, 130, (3, 8, 2), dtype=np.uint8)
    found = table(tmp_path, {"l.experts.gate_up_proj_blocks": blocks, "l.experts.gate_up_proj_scales": scales})
    infos = {info.name: info for info in separate_infos(found.infos(), GPT_OSS)}
    opened = infos["l.experts.1.up_proj.weight"].mapped
    assert opened is not None
    np.testing.assert_array_equal(opened().value.scales, scales[1, 1::2])


def test_openais_dense_matrices_are_turned_and_their_biases_dealt(tmp_path: Path):
    both = np.empty((3, 8, 64), np.float32)
    both[:, 0::2], both[:, 1::2] = GATE, UP
    biases = RNG.normal(0, 1, (3, 8)).astype(np.float32)
    arrays = {
        "l.experts.gate_up_proj": np.ascontiguousarray(both.swapaxes(1, 2)),
        "l.experts.gate_up_proj_bias": biases,
    }
    found = read(tmp_path, arrays, GPT_OSS)
    np.testing.assert_array_equal(found["l.experts.1.up_proj.bias"], biases[1, 1::2])
    assert_experts({name: value for name, value in found.items() if "bias" not in name}, gate=GATE, up=UP)


WHOLE = (
    Stack(r"(.*)\.both\.weight", ("{0}.gate.weight", "{0}.up.weight"), whole=True),
    Stack(r"(.*)\.other\.(.+)", ("{0}.own.{1}",), whole=True),
)


def test_a_tensor_of_no_experts_comes_apart_too_or_has_another_name(tmp_path: Path):
    words, scales, biases = mx.quantize(mx.array(GATE[0]), 32, 4)
    arrays = {"l.both.weight": GATE[0], "l.other.bias": GATE[0, 0], "m.other.weight": UP[0]}
    arrays |= {"q.both.weight": words, "q.both.scales": scales, "q.both.biases": biases}
    found = read(tmp_path, arrays, WHOLE)
    np.testing.assert_array_equal(found["l.gate.weight"], GATE[0, :2])
    np.testing.assert_array_equal(found["l.up.weight"], GATE[0, 2:])
    np.testing.assert_array_equal(found["l.own.bias"], GATE[0, 0])
    np.testing.assert_array_equal(found["m.own.weight"], UP[0])
    values = np.array(mx.dequantize(words, scales, biases, 32, 4))
    np.testing.assert_allclose(found["q.up.weight"], values[2:], rtol=1e-6)


def test_a_tensor_of_no_experts_that_does_not_divide_is_refused():
    info = TensorInfo("l.both.weight", (5, 8), 4, quantized=False, file="w.safetensors", kind="F32")
    with pytest.raises(CheckpointError, match=r"\[5, 8\] is not that of 2 matrices$"):
        list(separate_infos([info], WHOLE))


@pytest.mark.parametrize("name", ["switch_mlp.gate_proj.weight", "experts.gate_proj.weight", "experts.w1.weight"])
def test_experts_whose_matrices_go_by_other_names_come_apart(tmp_path: Path, name: str):
    found = read(tmp_path, {f"l.{name}": GATE}, stacks_of("w1", "w3", "w2"))
    np.testing.assert_array_equal(found["l.experts.2.w1.weight"], GATE[2])
    assert set(found) == {f"l.experts.{n}.w1.weight" for n in range(3)}


def test_parameters_of_experts_by_other_names_come_apart(tmp_path: Path):
    arrays = {"l.experts.gate_up_proj": np.concatenate([GATE, UP], axis=1), "l.experts.down_proj": DOWN}
    found = read(tmp_path, arrays, stacks_of("w1", "w3", "w2"))
    for name, values in (("w1", GATE), ("w3", UP), ("w2", DOWN)):
        np.testing.assert_array_equal(found[f"l.experts.1.{name}.weight"], values[1])


@pytest.mark.parametrize(
    ("shape", "named"), [((3, 5, 8), r"\[3, 5, 8\]"), ((3,), r"\[3\]"), ((0, 4, 8), r"\[0, 4, 8\]")]
)
def test_a_stack_that_does_not_divide_is_refused(shape: tuple[int, ...], named: str):
    info = TensorInfo("l.experts.gate_up_proj", shape, 4, quantized=False, file="w.safetensors", kind="F32")
    with pytest.raises(CheckpointError, match=named):
        list(separate_infos([info], STACKS))


def test_blocks_whose_scales_do_not_fit_are_refused(tmp_path: Path):
    arrays = {"l.w_blocks": np.zeros((3, 8, 2, 16), np.uint8), "l.w_scales": np.zeros((3, 8, 3), np.uint8)}
    with pytest.raises(CheckpointError, match="do not make mxfp4"):
        table(tmp_path, arrays)
