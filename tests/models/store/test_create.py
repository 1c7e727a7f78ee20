"""A model that was created is the model it was created from."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.errors import QuantizationError
from models.executors.base import Row, Step
from models.executors.onnx import OnnxExecutor, OnnxOptions, load
from models.quantization import Packed, spec_of_quant_type
from models.sources.base import Checkpoint
from models.store import QUANT_TYPES, CreateRequest, create_model
from models.to_mlx import PackedArrays, packed_to_mlx, to_mlx

from .conftest import blob_of, config_of, create, layer_of, manifest_of, write_folder

RECORDED = Path(__file__).parent / "recorded"


def logits(reference: Path | str, store: Path) -> np.ndarray:
    """Of twelve tokens, their weights widened. Shapes: (12, V)."""
    checkpoint = open_checkpoint(str(reference), store)
    model = build_model(checkpoint.config)
    executor = OnnxExecutor(
        load(checkpoint, model, OnnxOptions(weights="float32", capacity=64)), model.config.vocab_size
    )
    tokens = tuple(token % executor.vocab_size for token in range(12))
    found = executor.forward(Step((Row(0, 0, tokens, len(tokens)),)))
    assert found is not None
    return found.read()


def values(checkpoint: Checkpoint, component: str = "") -> dict[str, mx.array | PackedArrays]:
    found = {tensor.name: tensor.value for tensor in checkpoint.tensors(component)}
    return {name: packed_to_mlx(value) if isinstance(value, Packed) else to_mlx(value) for name, value in found.items()}


def same(left: mx.array, right: mx.array) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bool(mx.array_equal(left, right))


def same_packed(left: PackedArrays, right: PackedArrays) -> bool:
    pairs = [(left.weight, right.weight), (left.scales, right.scales), (left.biases, right.biases)]
    return left.spec == right.spec and all(
        a is None and b is None if a is None or b is None else same(a, b) for a, b in pairs
    )


@pytest.mark.parametrize(
    "fixture",
    [
        "llama_gqa",
        "llama_tied",
        "llama_untied_sharded",
        "qwen2",
        "qwen3",
        "smollm2",
        "smollm3",
        "gemma3_vision",
        "mistral3_vision",
    ],
)
def test_an_unquantised_model_has_the_same_logits_bit_by_bit(parity, store, fixture):
    create(parity / fixture, store)
    np.testing.assert_array_equal(logits("m", store), logits(parity / fixture, store))


@pytest.mark.parametrize("fixture", ["llama_gqa.gguf", "llama_gqa-Q8_0.gguf", "qwen2.gguf"])
def test_a_gguf_file_is_stored_as_it_is(parity, store, fixture):
    create(parity / fixture, store)
    assert layer_of(store, "m", "model") == (parity / fixture).read_bytes()
    np.testing.assert_array_equal(logits("m", store), logits(parity / fixture, store))


@pytest.mark.parametrize("fixture", ["qwen3", "llama_gqa", "llama_untied_sharded"])
def test_the_layers_are_those_that_ollama_itself_writes(parity, store, fixture):
    create(parity / fixture, store)
    recorded = json.loads((RECORDED / f"{fixture}.manifest.json").read_text())
    ours = manifest_of(store, "m")
    assert ours["config"] == recorded["config"]
    assert [layer for layer in ours["layers"] if "name" in layer] == recorded["layers"]


def test_the_manifest_is_ollamas_to_the_byte(parity, store):
    create(parity / "qwen3", store)
    ours = store / "manifests/registry.ollama.ai/library/m/latest"
    assert ours.read_bytes() == (RECORDED / "qwen3.manifest.json").read_bytes()


@pytest.mark.parametrize("quantize", QUANT_TYPES)
def test_a_quantised_model_holds_what_mlx_makes_of_its_weights(parity, tmp_path, store, quantize):
    # Wide enough for every group size, and with a head.
    widths = {"model.layers.0.self_attn.q_proj": 64, "model.layers.0.self_attn.v_proj": 64, "lm_head": 128}
    random = np.random.default_rng(3)
    tensors = {
        f"{name}.weight": mx.array(random.normal(size=(32, width)), mx.bfloat16) for name, width in widths.items()
    }
    tensors |= {
        "model.embed_tokens.weight": mx.array(random.normal(size=(32, 64)), mx.bfloat16),
        "model.norm.weight": mx.ones(64, mx.bfloat16),
        "model.layers.0.mlp.up_proj.weight": mx.array(random.normal(size=(32, 48)), mx.float32),
    }
    create(write_folder(tmp_path / "source", tensors), store, quantize=quantize)
    stored = values(open_checkpoint("m", store))
    eight = {"int4": "int8", "nvfp4": "mxfp8", "mxfp4": "mxfp8"}.get(quantize, quantize)
    expected = {
        "model.layers.0.self_attn.q_proj.weight": quantize,
        "model.layers.0.self_attn.v_proj.weight": eight,
        "lm_head.weight": eight,
    } | ({"model.layers.0.mlp.up_proj.weight": quantize} if quantize == "nvfp4" else {})
    assert {name for name, value in stored.items() if isinstance(value, PackedArrays)} == set(expected)
    for name, value in stored.items():
        if isinstance(value, PackedArrays):
            spec = spec_of_quant_type(expected[name], None)
            made = mx.quantize(tensors[name], spec.group_size, spec.bits, spec.mode)
            assert same_packed(value, PackedArrays(made[0], made[1], made[2] if len(made) > 2 else None, spec))
        else:
            assert same(value, tensors[name])
    assert config_of(store, "m")["file_type"] == quantize


@pytest.mark.parametrize(("quantize", "tolerance"), [("int8", 0.02), ("mxfp8", 0.5), ("nvfp4", 1.0)])
def test_a_quantised_model_answers_nearly_as_before(parity, store, quantize, tolerance):
    create(parity / "qwen3", store, quantize=quantize)
    before, after = logits(parity / "qwen3", store), logits("m", store)
    difference = np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2))
    assert 0 < difference < tolerance


@pytest.mark.parametrize("spec", [(64, 4, "affine"), (32, 8, "affine"), (64, 6, "affine"), (16, 4, "nvfp4")])
def test_a_model_that_mlx_quantised_is_kept_as_it_is(tmp_path, store, spec):
    group_size, bits, mode = spec
    dense = mx.array(np.random.default_rng(1).normal(size=(16, 128)), mx.float16)
    weight, scales, *biases = mx.quantize(dense, group_size, bits, mode)
    tensors = {"model.q.weight": weight, "model.q.scales": scales, "model.norm.weight": mx.ones(4)}
    tensors |= {"model.q.biases": biases[0]} if biases else {}
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    source = write_folder(tmp_path / "source", tensors, {"quantization": settings})
    create(source, store)
    before, after = values(open_checkpoint(str(source), store)), values(open_checkpoint("m", store))
    assert same_packed(after["model.q.weight"], before["model.q.weight"])
    assert same(after["model.norm.weight"], before["model.norm.weight"])
    assert [each["name"] for each in manifest_of(store, "m")["layers"]][:2] == ["model.norm.weight", "model.q.weight"]


@pytest.fixture
def published_gpt_oss(parity, tmp_path):
    """The tiny gpt-oss with its experts in mxfp4, in OpenAI's layout."""
    folder = tmp_path / "published"
    shutil.copytree(parity / "gpt_oss", folder)
    tensors = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            words, scales = mx.quantize(value.swapaxes(1, 2), 32, 4, "mxfp4")
            experts, rows, columns = words.shape
            tensors |= {f"{name}_blocks": words.view(mx.uint8).reshape(experts, rows, columns // 4, 16)}
            tensors |= {f"{name}_scales": scales}
        else:
            tensors[name] = value
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def test_experts_in_openais_mxfp4_are_kept_to_the_bit_under_the_stores_name_for_it(published_gpt_oss, store):
    create(published_gpt_oss, store)
    before, after = values(open_checkpoint(str(published_gpt_oss), store)), values(open_checkpoint("m", store))
    packed = [name for name, value in before.items() if isinstance(value, PackedArrays)]
    assert len(packed) == 4
    assert before.keys() == after.keys()
    assert all(same_packed(after[name], before[name]) for name in packed)
    blob = layer_of(store, "m", packed[0])
    assert json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"] == {
        "quant_type": "mxfp4",
        "group_size": "32",
    }
    assert config_of(store, "m")["file_type"] == "mxfp4"
    np.testing.assert_array_equal(logits("m", store), logits(published_gpt_oss, store))
    with pytest.raises(QuantizationError, match="quantised already"):
        create(published_gpt_oss, store, "q", quantize="int4")


def test_layers_quantised_unlike_the_rest_keep_their_own_kind(tmp_path, store):
    dense = mx.array(np.random.default_rng(1).normal(size=(16, 128)), mx.float16)
    tensors = {}
    for name, bits in (("a", 4), ("b", 8)):
        weight, scales, biases = mx.quantize(dense, 64, bits)
        tensors |= {f"{name}.weight": weight, f"{name}.scales": scales, f"{name}.biases": biases}
    settings = {"group_size": 64, "bits": 4, "b": {"group_size": 64, "bits": 8}}
    create(write_folder(tmp_path / "source", tensors, {"quantization": settings}), store)
    specs = {info.name: info.spec.bits for info in open_checkpoint("m", store).infos() if info.spec}
    assert specs == {"a.weight": 4, "b.weight": 8}
    assert config_of(store, "m")["file_type"] == ""


def test_the_experts_of_a_layer_are_stacked_into_one_blob(tmp_path, store):
    random = np.random.default_rng(5)
    group = "model.layers.1.mlp.experts"
    experts = {
        f"{group}.{index}.{projection}.weight": mx.array(random.normal(size=(16, 64)), mx.bfloat16)
        for index in range(11)
        for projection in ("up_proj", "down_proj")
    }
    source = write_folder(tmp_path / "source", experts)
    create(source, store, "dense")
    stored = values(open_checkpoint("dense", store))
    assert same(
        stored[f"{group}.up_proj.weight"], mx.stack([experts[f"{group}.{n}.up_proj.weight"] for n in range(11)])
    )
    assert manifest_of(store, "dense")["layers"][0]["name"] == group
    create(source, store, "packed", quantize="int4")
    packed = values(open_checkpoint("packed", store))
    assert {name: value.spec.bits for name, value in packed.items()} == {
        f"{group}.down_proj.weight": 8,
        f"{group}.up_proj.weight": 4,
    }


@pytest.mark.parametrize("name", ["m", "m:tag", "me/m", "example.com/me/m:1b", "localhost:5000/me/m"])
def test_every_form_of_a_name_opens_what_was_created_under_it(parity, store, name):
    create(parity / "qwen3", store, name)
    assert open_checkpoint(name, store).config["model_type"] == "qwen3"


def test_a_configuration_that_this_runner_refuses_is_stored_all_the_same(parity, tmp_path, store):
    folder = tmp_path / "odd"
    shutil.copytree(parity / "qwen3", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))
    notes = create(folder, store)
    assert any("'mish'" in note and "this runner cannot load it" in note for note in notes)
    assert set(values(open_checkpoint("m", store))) == set(values(open_checkpoint(str(folder), store)))


def test_blobs_and_manifest_have_ollamas_modes(parity, store):
    before = os.umask(0o077)
    try:
        create(parity / "qwen3", store)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in store.rglob("*") if path.is_file()} == {0o644}


def test_progress_rises_to_one(parity, store):
    seen: list[float] = []
    create_model(CreateRequest("m", parity / "qwen3", store), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    again: list[float] = []
    create_model(CreateRequest("m", parity / "qwen3", store), progress=again.append)
    assert again[-1] == 1.0


def test_a_template_is_a_layer_and_the_given_one_wins(parity, store):
    notes = create(parity / "llama_gqa", store, "found")
    assert notes == ["chat format: the model's own"]
    assert b"<|im_start|>user\n{{ else }}<|im_start|>user\n{{ end }}" in layer_of(store, "found", "template")
    assert json.loads(layer_of(store, "found", "params")) == {"stop": ["<|im_start|>", "<|im_end|>"]}
    assert create(parity / "llama_gqa", store, "given", template="Q: {{ .Prompt }}") == []
    assert layer_of(store, "given", "template") == b"Q: {{ .Prompt }}"
    assert "params" not in {each["mediaType"].split(".")[-1] for each in manifest_of(store, "given")["layers"]}


def test_a_template_file_beside_the_weights_reaches_the_readers_of_the_store(parity, tmp_path, store):
    source = tmp_path / "source"
    shutil.copytree(parity / "llama_gqa", source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text(template)
    assert create(source, store) == ["chat format: the model's own"]
    assert json.loads(open_checkpoint("m", store).read("chat_template.json") or b"") == {"chat_template": template}


def test_a_chat_that_goes_by_more_than_whose_turn_it_is_is_written_in_a_known_format(parity, tmp_path, store):
    source = tmp_path / "source"
    shutil.copytree(parity / "llama_gqa", source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ loop.index }}<|im_start|>{{ m.content }}{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert create(source, store) == ["chat format: ChatML"]
    assert b"<|im_start|>{{ .Role }}" in layer_of(store, "m", "template")


def test_a_chat_format_nobody_knows_is_said(parity, tmp_path, store):
    source = tmp_path / "source"
    shutil.copytree(parity / "llama_gqa", source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    templates = [{"name": "tools", "template": "<|im_start|>"}, {"name": "default", "template": "### Human:"}]
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": templates}))
    (note,) = create(source, store)
    assert "give Ollama a template with --template" in note
    assert "template" not in {each["mediaType"].split(".")[-1] for each in manifest_of(store, "m")["layers"]}


def test_a_gguf_file_is_created_with_the_projector_beside_it_and_sees(parity, store):
    folder = parity.with_name("parity_vision") / "projectors" / "gemma3"
    assert create(folder / "model.gguf", store)[-1] == "projector: mmproj.gguf"
    made = manifest_of(store, "m")
    stored = [(each["mediaType"].rpartition(".")[2], blob_of(store, each)) for each in made["layers"][:2]]
    assert stored == [
        ("model", (folder / "model.gguf").read_bytes()),
        ("projector", (folder / "mmproj.gguf").read_bytes()),
    ]
    assert json.loads(blob_of(store, made["config"]))["model_families"] == ["gemma3", "clip"]
    opened = open_checkpoint("m", store, verify_digests=True)
    assert opened.config == open_checkpoint(str(folder / "model.gguf"), store).config
    assert "vision_config" in opened.config


def test_a_gguf_file_is_described_by_its_metadata(parity, store):
    assert create(parity / "llama_gqa-Q8_0.gguf", store) == ["chat format: the model's own"]
    # The very bytes that Ollama v0.34.4 writes.
    assert blob_of(store, manifest_of(store, "m")["config"]) == (
        b'{"model_format":"gguf","model_family":"llama","model_families":["llama"],"model_type":"38K","file_type":"Q8_0"}\n'
    )
