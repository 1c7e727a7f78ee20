import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.errors import CheckpointError, QuantizationError
from models.quantization import Packed, QuantizationSpec, dequantize
from models.sources.base import Tensor
from models.sources.hf import HFDirectory
from models.to_mlx import to_mlx


def folder(path: Path, arrays: dict[str, mx.array], config: dict[str, object] | None = None) -> HFDirectory:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    mx.save_safetensors(str(path / "model.safetensors"), arrays)
    return HFDirectory(path)


def values(checkpoint: HFDirectory, component: str = "") -> dict[str, Tensor]:
    return {tensor.name: tensor.value for tensor in checkpoint.tensors(component)}


def quantized(name: str, dense: mx.array, **how: object) -> dict[str, mx.array]:
    weight, scales, *biases = mx.quantize(dense, **how)
    return {f"{name}.weight": weight, f"{name}.scales": scales} | ({f"{name}.biases": biases[0]} if biases else {})


def shard(path: Path, shards: dict[str, dict[str, mx.array]]) -> None:
    path.mkdir(exist_ok=True)
    for file, arrays in shards.items():
        mx.save_safetensors(str(path / file), arrays)
    weight_map = {name: file for file, arrays in shards.items() for name in arrays}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text("{}")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_plain_tensors_come_as_they_are_stored(tmp_path: Path, dtype: mx.Dtype):
    checkpoint = folder(tmp_path / "m", {"a.weight": mx.arange(6).reshape(2, 3).astype(dtype), "b.bias": mx.ones(2)})
    found = values(checkpoint)
    assert to_mlx(found["a.weight"]).dtype == dtype
    assert found["a.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    infos = {info.name: (info.shape, info.nbytes, info.quantized, info.kind) for info in checkpoint.infos()}
    kind = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}[dtype]
    assert infos == {"a.weight": ((2, 3), 6 * dtype.size, False, kind), "b.bias": ((2,), 8, False, "F32")}
    assert checkpoint.nbytes == 6 * dtype.size + 8


def test_shards_are_read_through_their_index_and_only_through_it(tmp_path: Path):
    shard(tmp_path, {"model-1.safetensors": {"a": mx.ones(2)}, "model-2.safetensors": {"b": mx.zeros(3)}})
    mx.save_safetensors(str(tmp_path / "consolidated.safetensors"), {"tok_embeddings": mx.ones(4)})
    assert set(values(HFDirectory(tmp_path))) == {"a", "b"}


def test_parts_of_a_quantised_matrix_may_lie_in_two_shards(tmp_path: Path):
    parts = quantized("l", mx.ones((2, 64)), group_size=64, bits=4)
    shard(tmp_path, {"1.safetensors": {"l.weight": parts.pop("l.weight")}, "2.safetensors": parts})
    (tmp_path / "config.json").write_text('{"quantization": {"group_size": 64, "bits": 4}}')
    (packed,) = values(HFDirectory(tmp_path)).values()
    assert isinstance(packed, Packed)
    assert np.allclose(dequantize(packed), 1)


def test_a_missing_shard_is_named(tmp_path: Path):
    shard(tmp_path, {"model-1.safetensors": {"a": mx.ones(2)}, "model-2.safetensors": {"b": mx.zeros(3)}})
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: the file is missing"):
        list(HFDirectory(tmp_path).infos())


def test_a_tensor_that_the_index_promises_and_no_shard_has_is_named(tmp_path: Path):
    shard(tmp_path, {"model-1.safetensors": {"a": mx.ones(2)}, "model-2.safetensors": {"b": mx.zeros(3)}})
    mx.save_safetensors(str(tmp_path / "model-2.safetensors"), {"other": mx.ones(1)})
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: tensor b: is missing"):
        list(HFDirectory(tmp_path).infos())


def test_an_index_cannot_name_a_file_outside_the_folder(tmp_path: Path):
    mx.save_safetensors(str(tmp_path / "secret.safetensors"), {"a": mx.ones(1)})
    shard(tmp_path / "m", {"model-1.safetensors": {"b": mx.ones(2)}})
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="outside the folder"):
            list(HFDirectory(tmp_path / "m").infos())


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": {}}', "[]", "{", "{}"]
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, index: str):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        list(HFDirectory(tmp_path).infos())


def test_a_tensor_in_two_files_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("model-a.safetensors", "model-b.safetensors"):
        mx.save_safetensors(str(tmp_path / name), {"x": mx.ones(1)})
    with pytest.raises(CheckpointError, match="tensor x: is in"):
        list(HFDirectory(tmp_path).infos())


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({"group_size": 64, "bits": 4}, QuantizationSpec("affine", 4, 64)),
        ({"group_size": 32, "bits": 8}, QuantizationSpec("affine", 8, 32)),
        ({"group_size": 32, "bits": 3}, QuantizationSpec("affine", 3, 32)),
        ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, QuantizationSpec("nvfp4", 4, 16)),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, QuantizationSpec("mxfp4", 4, 32)),
        ({"group_size": 32, "bits": 8, "mode": "mxfp8"}, QuantizationSpec("mxfp8", 8, 32)),
    ],
)
def test_a_folder_that_mlx_quantised_is_read_in_every_mode(
    tmp_path: Path, settings: dict[str, object], spec: QuantizationSpec
):
    dense = mx.random.normal((16, 128), key=mx.random.key(1))
    checkpoint = folder(tmp_path, quantized("l", dense, **settings), {"quantization": settings})
    (packed,) = values(checkpoint).values()
    assert isinstance(packed, Packed)
    assert packed.spec == spec
    assert np.abs(dequantize(packed) - np.array(dense)).max() < 0.6
    (info,) = checkpoint.infos()
    assert (info.name, info.shape, info.spec, info.kind) == ("l.weight", (16, 128), spec, spec.mode)


def test_layers_may_differ_from_the_model_and_stay_plain(tmp_path: Path):
    dense = mx.ones((4, 64))
    arrays = quantized("a", dense, group_size=64, bits=4) | quantized("b", dense, group_size=32, bits=8)
    config = {"quantization": {"group_size": 64, "bits": 4, "a": True, "b": {"group_size": 32, "bits": 8}, "c": False}}
    found = values(folder(tmp_path, arrays | {"c.weight": dense}, config))
    assert isinstance(found["a.weight"], Packed)
    assert isinstance(found["b.weight"], Packed)
    assert found["a.weight"].spec == QuantizationSpec("affine", 4, 64)
    assert found["b.weight"].spec == QuantizationSpec("affine", 8, 32)
    assert isinstance(found["c.weight"], np.ndarray)


def test_a_layer_said_to_be_plain_that_is_quantised_is_refused(tmp_path: Path):
    arrays = quantized("a", mx.ones((4, 64)), group_size=64, bits=4)
    checkpoint = folder(tmp_path, arrays, {"quantization": {"group_size": 64, "bits": 4, "a": False}})
    with pytest.raises(QuantizationError, match=r"a\.weight.*False"):
        list(checkpoint.tensors())


def test_settings_that_the_shapes_contradict_are_refused(tmp_path: Path):
    arrays = quantized("a", mx.ones((4, 128)), group_size=64, bits=4)
    checkpoint = folder(tmp_path, arrays, {"quantization": {"group_size": 64, "bits": 8}})
    with pytest.raises(CheckpointError, match=r"tensor a\.weight: packed weights"):
        list(checkpoint.tensors())


def test_affine_without_biases_is_refused(tmp_path: Path):
    arrays = quantized("a", mx.ones((4, 64)), group_size=64, bits=4)
    del arrays["a.biases"]
    with pytest.raises(CheckpointError, match="biases"):
        list(folder(tmp_path, arrays, {"quantization": {"group_size": 64, "bits": 4}}).tensors())


def test_quantised_tensors_without_settings_are_refused(tmp_path: Path):
    arrays = quantized("a", mx.ones((4, 64)), group_size=64, bits=4)
    with pytest.raises(QuantizationError, match=r"a\.weight"):
        list(folder(tmp_path, arrays).tensors())


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_foreign_quantisation_is_refused_by_its_name(tmp_path: Path, method: str):
    checkpoint = folder(tmp_path, {"a.weight": mx.ones((2, 2))}, {"quantization_config": {"quant_method": method}})
    with pytest.raises(QuantizationError, match=f"{method}.*bfloat16"):
        list(checkpoint.infos())


def test_float8_weights_are_refused_even_if_nothing_announces_them(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    header = b'{"a.weight":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(QuantizationError, match=r"a\.weight is stored as F8_E4M3"):
        list(HFDirectory(tmp_path).infos())


def test_a_component_of_a_pipeline_is_its_own_folder(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    folder(tmp_path / "text_encoder", {"x": mx.ones(2)})
    settings = {"quantization": {"group_size": 64, "bits": 4}}
    folder(tmp_path / "transformer", quantized("l", mx.ones((4, 64)), group_size=64, bits=4), settings)
    (tmp_path / "scheduler").mkdir()
    checkpoint = HFDirectory(tmp_path)
    assert checkpoint.config["_class_name"] == "ZImagePipeline"
    assert set(values(checkpoint, "text_encoder")) == {"x"}
    assert isinstance(values(checkpoint, "transformer")["l.weight"], Packed)
    assert checkpoint.read("text_encoder/config.json") is not None
    assert checkpoint.nbytes == 8 + 4 * 32 + 2 * 4 * 4
    with pytest.raises(CheckpointError, match="no component 'vae'"):
        list(checkpoint.infos("vae"))


def test_files_are_read_by_name_and_never_from_outside(tmp_path: Path):
    checkpoint = folder(tmp_path / "m", {"a": mx.ones(1)})
    (tmp_path / "secret").write_text("s")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    assert checkpoint.read("tokenizer.json") == b"{}"
    names = ("../secret", str(tmp_path / "secret"), "", ".", "absent.json", "model.safetensors/x")
    assert [checkpoint.read(name) for name in names] == [None] * 6


@pytest.mark.parametrize("text", ["{", "[]", "\ufeffnull"])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: is not"):
        _ = HFDirectory(tmp_path).config


def test_a_folder_of_pickles_is_refused_with_the_reason(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"no safetensors file.*pytorch_model\.bin"):
        list(HFDirectory(tmp_path).infos())
