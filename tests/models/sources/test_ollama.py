import json
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.errors import CheckpointError, ModelNotFoundError, QuantizationError
from models.quantization import Packed, QuantizationSpec, dequantize
from models.sources.base import Checkpoint, Tensor

DENSE = mx.array(np.random.default_rng(7).normal(size=(16, 128)), mx.float32)


def combined(name: str, dense: mx.array, spec: QuantizationSpec) -> dict[str, mx.array]:
    weight, scales, *biases = mx.quantize(dense, spec.group_size, spec.bits, spec.mode)
    return {name: weight, f"{name}.scale": scales} | ({f"{name}.bias": biases[0]} if biases else {})


def values(checkpoint: Checkpoint, component: str = "") -> dict[str, Tensor]:
    return {tensor.name: tensor.value for tensor in checkpoint.tensors(component)}


def packed_of(value: Tensor) -> Packed:
    assert isinstance(value, Packed)
    return value


def test_plain_blobs_and_configuration_layers_are_read(store_writer):
    store_writer.json("config.json", {"architectures": ["Qwen3ForCausalLM"]})
    store_writer.json("tokenizer.json", {"version": "1.0"})
    store_writer.tensors("model.norm.weight", {"model.norm.weight": mx.ones(4, mx.bfloat16)})
    store_writer.tensors("model.q.bias", {"model.q.bias": mx.zeros(3)})
    store_writer.manifest()
    checkpoint = open_checkpoint("tiny", store_writer.store)
    assert checkpoint.reference == "tiny:latest"
    assert checkpoint.config["architectures"] == ["Qwen3ForCausalLM"]
    assert json.loads(checkpoint.read("tokenizer.json") or b"") == {"version": "1.0"}
    assert checkpoint.read("generation_config.json") is None
    found = values(checkpoint)
    assert {name: value.shape for name, value in found.items()} == {"model.norm.weight": (4,), "model.q.bias": (3,)}
    assert {info.name: info.nbytes for info in checkpoint.infos()} == {"model.norm.weight": 8, "model.q.bias": 12}


@pytest.mark.parametrize(
    ("quant_type", "spec"),
    [
        ("int4", QuantizationSpec("affine", 4, 32)),
        ("INT4", QuantizationSpec("affine", 4, 64)),
        ("int8", QuantizationSpec("affine", 8, 64)),
        ("nvfp4", QuantizationSpec("nvfp4", 4, 16)),
        ("mxfp8", QuantizationSpec("mxfp8", 8, 32)),
        ("mxfp4", QuantizationSpec("mxfp4", 4, 32)),
    ],
)
@pytest.mark.parametrize("declares_group", [True, False])
def test_a_combined_blob_is_read_in_every_quantisation(store_writer, quant_type, spec, declares_group):
    metadata = {"quant_type": quant_type} | ({"group_size": str(spec.group_size)} if declares_group else {})
    store_writer.tensors("l.weight", combined("l.weight", DENSE, spec), metadata)
    store_writer.manifest()
    checkpoint = open_checkpoint("tiny", store_writer.store)
    packed = packed_of(values(checkpoint)["l.weight"])
    assert packed.spec == spec
    assert np.abs(dequantize(packed) - np.array(DENSE)).max() < 0.6
    (info,) = checkpoint.infos()
    assert (info.name, info.shape, info.quantized, info.spec) == ("l.weight", (16, 128), True, spec)


def test_affine_without_any_metadata_is_told_by_its_shapes(store_writer):
    store_writer.tensors("a.weight", combined("a.weight", DENSE, QuantizationSpec("affine", 4, 32)))
    store_writer.tensors("b.weight", combined("b.weight", DENSE, QuantizationSpec("affine", 8, 64)))
    store_writer.manifest()
    found = values(open_checkpoint("tiny", store_writer.store))
    assert packed_of(found["a.weight"]).spec == QuantizationSpec("affine", 4, 32)
    assert packed_of(found["b.weight"]).spec == QuantizationSpec("affine", 8, 64)


def test_the_bias_of_a_layer_is_not_the_zero_point_of_its_weight(store_writer):
    spec = QuantizationSpec("affine", 8, 64)
    store_writer.tensors("l.weight", combined("l.weight", DENSE, spec), {"quant_type": "int8", "group_size": "64"})
    store_writer.tensors("l.bias", {"l.bias": mx.full(16, 3.0)})
    store_writer.manifest()
    found = values(open_checkpoint("tiny", store_writer.store))
    assert set(found) == {"l.weight", "l.bias"}
    assert found["l.bias"].tolist() == [3.0] * 16


def test_a_packed_blob_holds_tensors_of_several_quantisations(store_writer):
    group = "model.layers.1.mlp.experts"
    # Nothing but the metadata tells these two apart: the shapes are alike.
    up, down = QuantizationSpec("mxfp4", 4, 32), QuantizationSpec("affine", 4, 32)
    stacked = mx.stack([DENSE, -DENSE])
    arrays = combined(f"{group}.up.weight", stacked, up) | combined(f"{group}.down.weight", stacked, down)
    metadata = {
        "quant_type": "int4",
        f"{group}.up.weight.quant_type": "mxfp4",
        f"{group}.up.weight.group_size": "32",
        f"{group}.down.weight.group_size": "32",
    }
    store_writer.tensors(group, arrays | {f"{group}.gate.weight": mx.ones((2, 2))}, metadata)
    store_writer.manifest()
    found = values(open_checkpoint("tiny", store_writer.store))
    assert packed_of(found[f"{group}.up.weight"]).spec == up
    assert packed_of(found[f"{group}.down.weight"]).spec == down
    assert packed_of(found[f"{group}.down.weight"]).shape == (2, 16, 128)
    assert found[f"{group}.gate.weight"].shape == (2, 2)


def test_a_global_scale_is_part_of_its_matrix(store_writer):
    spec = QuantizationSpec("nvfp4", 4, 16)
    arrays = combined("l.weight", DENSE, spec)
    store_writer.tensors("l.weight", arrays | {"l.weight.global_scale": mx.array(2.0)}, {"quant_type": "nvfp4"})
    store_writer.manifest()
    packed = packed_of(values(open_checkpoint("tiny", store_writer.store))["l.weight"])
    assert packed.global_scale is not None
    assert np.abs(dequantize(packed) - 2 * np.array(DENSE)).max() < 1.2


def test_the_oldest_form_has_anonymous_tensors_and_a_blob_a_part(store_writer):
    parts = combined("data", DENSE, QuantizationSpec("affine", 8, 64))
    store_writer.json("model_index.json", {"_class_name": "ZImagePipeline", "quantization": "FP8"})
    name = "transformer/l.weight"
    store_writer.tensors(name, {"data": parts["data"]})
    store_writer.tensors(f"{name}_scale", {"data": parts["data.scale"]})
    store_writer.tensors(f"{name}_qbias", {"data": parts["data.bias"]})
    # Two tensors of equal content are one blob.
    store_writer.tensors("transformer/norm1", {"data": mx.ones(2)})
    store_writer.tensors("transformer/norm2", {"data": mx.ones(2)})
    store_writer.manifest()
    checkpoint = open_checkpoint("tiny", store_writer.store)
    found = values(checkpoint, "transformer")
    assert packed_of(found["l.weight"]).spec == QuantizationSpec("affine", 8, 64)
    assert found["norm1"].tolist() == found["norm2"].tolist() == [1, 1]
    assert checkpoint.config["_class_name"] == "ZImagePipeline"


def test_a_component_is_chosen_and_its_prefix_taken_off(store_writer):
    spec = QuantizationSpec("affine", 4, 32)
    store_writer.json("text_encoder/config.json", {"hidden_size": 8})
    store_writer.tensors("text_encoder/x.weight", {"text_encoder/x.weight": mx.ones(2)})
    store_writer.tensors("transformer/l.weight", combined("transformer/l.weight", DENSE, spec), {"quant_type": "int4"})
    store_writer.tensors("vae/y.weight", {"y.weight": mx.zeros(2)})
    store_writer.manifest()
    checkpoint = open_checkpoint("tiny", store_writer.store)
    assert set(values(checkpoint, "text_encoder")) == {"x.weight"}
    assert packed_of(values(checkpoint, "transformer")["l.weight"]).spec == spec
    assert set(values(checkpoint, "vae")) == {"y.weight"}
    assert set(values(checkpoint)) == {"text_encoder/x.weight", "transformer/l.weight", "vae/y.weight"}
    with pytest.raises(CheckpointError, match="no component 'text'"):
        list(checkpoint.infos("text"))


@pytest.mark.parametrize("described", [{}, {"draft": {"tensor_prefix": "mtp."}}])
def test_the_tensors_of_a_draft_model_are_left_out(store_writer, described):
    prefix = "mtp." if described else "draft."
    store_writer.json("draft/config.json", {})
    store_writer.tensors("a", {"a": mx.ones(1)})
    store_writer.tensors(f"{prefix}a", {f"{prefix}a": mx.ones(1)})
    store_writer.manifest(config=described)
    assert set(values(open_checkpoint("tiny", store_writer.store))) == {"a"}


def test_an_unknown_quantisation_is_refused_by_its_name(store_writer):
    store_writer.tensors("a", combined("a", DENSE, QuantizationSpec("affine", 4, 32)), {"quant_type": "hqq3"})
    store_writer.manifest()
    with pytest.raises(QuantizationError, match="hqq3"):
        list(open_checkpoint("tiny", store_writer.store).infos())


def test_a_quantisation_that_the_shapes_contradict_is_refused(store_writer):
    store_writer.tensors("a", combined("a", DENSE, QuantizationSpec("mxfp4", 4, 32)), {"quant_type": "mxfp8"})
    store_writer.manifest()
    with pytest.raises(QuantizationError, match="tensor a: packed weights"):
        list(open_checkpoint("tiny", store_writer.store).infos())


def test_a_gguf_layer_is_opened_as_a_gguf_file(store_writer, tmp_path: Path):
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store_writer.blob("application/vnd.ollama.image.model", file.read_bytes())
    store_writer.blob("application/vnd.ollama.image.template", b"{{ .Prompt }}")
    store_writer.manifest("hf.co/org/repo/q4_k_m")
    checkpoint = open_checkpoint("hf.co/org/Repo:Q4_K_M", store_writer.store)
    assert checkpoint.reference == "hf.co/org/Repo:Q4_K_M"
    assert [info.name for info in checkpoint.infos()] == ["model.norm.weight"]


def whole_store(store_writer) -> tuple[Path, Path]:
    blob = store_writer.tensors("a.weight", {"a.weight": mx.ones(8)})
    return blob, store_writer.manifest()


def test_a_model_that_is_not_there_is_told_with_the_remedy(store_writer):
    whole_store(store_writer)
    with pytest.raises(ModelNotFoundError, match=r"'other:latest' not found.*`ollama pull other:latest`"):
        open_checkpoint("other", store_writer.store)


def test_a_missing_blob_is_named_with_the_remedy(store_writer):
    blob, _ = whole_store(store_writer)
    blob.unlink()
    with pytest.raises(
        CheckpointError, match=rf"{blob.name} \(a.weight\): the blob is missing; try `ollama pull tiny:latest`"
    ):
        open_checkpoint("tiny", store_writer.store)


def test_a_blob_of_the_wrong_size_is_named_with_the_remedy(store_writer):
    blob, _ = whole_store(store_writer)
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{blob.name}.*bytes where the manifest says.*`ollama pull tiny"):
        open_checkpoint("tiny", store_writer.store)


def test_a_blob_of_the_wrong_digest_is_found_when_asked(store_writer):
    blob, _ = whole_store(store_writer)
    open_checkpoint("tiny", store_writer.store, verify_digests=True)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    open_checkpoint("tiny", store_writer.store)
    with pytest.raises(CheckpointError, match=rf"{blob.name}.*the blob is damaged"):
        open_checkpoint("tiny", store_writer.store, verify_digests=True)


def test_a_blob_that_is_no_safetensors_file_is_named_with_its_layer(store_writer):
    store_writer.blob("application/vnd.ollama.image.tensor", b"\xff" * 64, "a.weight")
    store_writer.manifest()
    with pytest.raises(CheckpointError, match=r"\(a\.weight\): not a safetensors file"):
        list(open_checkpoint("tiny", store_writer.store).infos())


def with_layer(**change: object) -> Callable[[dict], object]:
    return lambda manifest: manifest | {"layers": [manifest["layers"][0] | change]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: [],
        lambda _: {"layers": None},
        lambda _: {"layers": ["x"]},
        with_layer(digest="sha256:../../../../etc/passwd"),
        with_layer(digest="sha256:" + "g" * 64),
        with_layer(size="12"),
        with_layer(digest=None),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(store_writer, damage: Callable[[dict], object]):
    _, path = whole_store(store_writer)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=r"latest: the manifest.*`ollama pull tiny:latest`"):
        open_checkpoint("tiny", store_writer.store)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 9000])
def test_a_manifest_that_is_not_json_is_refused(store_writer, text: bytes):
    _, path = whole_store(store_writer)
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        open_checkpoint("tiny", store_writer.store)


def test_a_model_without_weights_is_refused(store_writer):
    store_writer.json("config.json", {})
    store_writer.manifest()
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint("tiny", store_writer.store)


def test_an_adapter_is_refused_and_not_forgotten(store_writer):
    store_writer.tensors("a", {"a": mx.ones(1)})
    store_writer.blob("application/vnd.ollama.image.adapter", b"GGUF")
    store_writer.manifest()
    with pytest.raises(CheckpointError, match="LoRA"):
        open_checkpoint("tiny", store_writer.store)


def test_a_model_without_a_configuration_says_so(store_writer):
    whole_store(store_writer)
    with pytest.raises(CheckpointError, match=r"neither config\.json nor model_index\.json"):
        _ = open_checkpoint("tiny", store_writer.store).config
