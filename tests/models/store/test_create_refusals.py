"""What is not stored, and the reason that is given."""

import json
import os
import shutil

import gguf
import mlx.core as mx
import numpy as np
import pytest

from models.errors import CheckpointError, QuantizationError, StoreError
from models.store import CreateRequest, create_model

from .conftest import create, write_folder


@pytest.mark.parametrize("name", ["", "a b", "../m", "m:", "a/b/c/d", "m:../../x", "x" * 81, "m:t/../../../y"])
def test_what_is_no_name_is_refused_before_anything_is_read(tmp_path, store, name):
    with pytest.raises(StoreError, match="is no model name"):
        create(tmp_path / "nothing", store, name)
    assert not store.exists()


@pytest.mark.parametrize("missing", ["nothing", "model.safetensors"])
def test_a_source_that_is_none_is_refused(tmp_path, store, missing):
    path = tmp_path / missing
    if path.suffix:
        mx.save_safetensors(str(path), {"a": mx.ones(1)})
    with pytest.raises(CheckpointError, match=r"no such file or folder|name the folder it is in"):
        create(path, store)
    with pytest.raises(CheckpointError, match=r"neither a config\.json nor a model_index\.json"):
        create(tmp_path, store)


def test_weights_quantised_in_a_foreign_way_are_refused(tmp_path, store):
    config = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(QuantizationError, match="gptq"):
        create(write_folder(tmp_path / "gptq", {"a.weight": mx.zeros((4, 4))}, config), store)
    source = write_folder(tmp_path / "fp8", {"a.weight": mx.zeros((4, 4))})
    entry = {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]}
    header = json.dumps({"a.weight": entry}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(QuantizationError, match="F8_E4M3"):
        create(source, store)


def test_architectures_with_rules_of_their_own_are_not_quantised_by_others(tmp_path, store):
    config = {"architectures": ["MuseGlimmerForCausalLM"], "model_type": "glimmer"}
    source = write_folder(tmp_path / "source", {"a.weight": mx.ones((64, 64))}, config)
    with pytest.raises(QuantizationError, match="MuseGlimmerForCausalLM is quantised by rules of its own"):
        create(source, store, quantize="int4")
    (note,) = create(source, store)
    assert "this runner cannot load it" in note


def test_what_is_quantised_already_is_not_quantised_again(tmp_path, store):
    weight, scales, biases = mx.quantize(mx.ones((16, 128)), 64, 4)
    tensors = {"q.weight": weight, "q.scales": scales, "q.biases": biases}
    source = write_folder(tmp_path / "source", tensors, {"quantization": {"group_size": 64, "bits": 4}})
    with pytest.raises(QuantizationError, match="quantised already"):
        create(source, store, quantize="int4")
    assert not store.exists()


def test_a_gguf_file_is_not_quantised(parity, store):
    with pytest.raises(QuantizationError, match="stored as it is"):
        create(parity / "llama_gqa.gguf", store, quantize="int8")


def test_missing_experts_are_named(tmp_path, store):
    group = "model.layers.1.mlp.experts"
    source = write_folder(tmp_path / "s", {f"{group}.{n}.up_proj.weight": mx.ones((4, 4)) for n in (0, 2)})
    with pytest.raises(CheckpointError, match=r"experts\.up_proj\.weight: some of its experts are missing"):
        create(source, store)


def test_experts_of_different_shapes_are_refused(tmp_path, store):
    group = "model.layers.1.mlp.experts"
    source = write_folder(tmp_path / "s", {f"{group}.{n}.up_proj.weight": mx.ones((4 + n, 4)) for n in range(2)})
    with pytest.raises(CheckpointError, match="its experts differ in shape"):
        create(source, store)


def test_what_could_not_be_read_back_is_not_stored(tmp_path, store):
    weight, scales, biases = mx.quantize(mx.ones((16, 128)), 64, 2)
    tensors = {"q.weight": weight, "q.scales": scales, "q.biases": biases}
    source = write_folder(tmp_path / "two-bits", tensors, {"quantization": {"group_size": 64, "bits": 2}})
    with pytest.raises(QuantizationError, match="2 bits in groups of 64, which the Ollama store cannot tell"):
        create(source, store)
    header = json.dumps({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode()
    source = write_folder(tmp_path / "double", {"a": mx.ones(1)})
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match="its type F64 is not supported"):
        create(source, store)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("general.type", "adapter", "a part of one: adapter"), ("split.count", 3, "one of 3 parts of a model")],
)
def test_a_gguf_file_that_is_no_whole_model_is_refused(tmp_path, store, key, value, words):
    writer = gguf.GGUFWriter(str(tmp_path / "part.gguf"), "llama")
    if isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint16(key, value)
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=words):
        create(tmp_path / "part.gguf", store)
    assert not store.exists()


def test_a_truncated_source_leaves_nothing(parity, tmp_path, store):
    source = tmp_path / "source"
    shutil.copytree(parity / "llama_gqa", source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        create(source, store)
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes((parity / "llama_gqa.gguf").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        create(gguf, store)
    assert not store.exists()


def test_a_source_that_shrinks_while_it_is_read_leaves_nothing(parity, tmp_path, store):
    source = tmp_path / "source"
    shutil.copytree(parity / "llama_gqa", source)
    weights = source / "model.safetensors"
    whole = weights.read_bytes()

    def cut(fraction: float) -> None:
        weights.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(CheckpointError, match="cut short"):
        create_model(CreateRequest("m", source, store), progress=cut)
    assert not store.exists()


def test_too_little_space_is_said_before_anything_is_written(parity, store, monkeypatch):
    usage = shutil.disk_usage(parity)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=150_000))
    with pytest.raises(StoreError, match=r"not enough space in .*: the model needs 0\.00 GB more"):
        create(parity / "llama_gqa", store)
    assert not store.exists()


def test_a_store_that_is_no_folder_is_reported(parity, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="the store cannot be written: Not a directory"):
        create(parity / "qwen3", tmp_path / "file" / "store")


def test_a_store_that_may_not_be_written_names_the_remedy(parity, store):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    store.mkdir(mode=0o555)
    with pytest.raises(StoreError, match="Permission denied; run this as the user who owns the store"):
        create(parity / "qwen3", store)
