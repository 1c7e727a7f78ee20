"""An image pipeline in the store: components by their prefix, JSON files by their path."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.errors import CheckpointError, StoreError
from models.quantization import Packed
from models.store import CreateRequest, create_model
from models.to_mlx import to_mlx

from .conftest import config_of, files_of, layer_of, manifest_of, write_folder

RANDOM = np.random.default_rng(11)
TENSORS = {
    "text_encoder": {
        "model.embed_tokens.weight": mx.array(RANDOM.normal(size=(32, 64)), mx.bfloat16),
        "model.layers.0.mlp.down_proj.weight": mx.array(RANDOM.normal(size=(16, 64)), mx.bfloat16),
    },
    "transformer": {
        "blocks.0.to_q.weight": mx.array(RANDOM.normal(size=(8, 64)), mx.bfloat16),
        "blocks.0.to_q.bias": mx.array(RANDOM.normal(size=8), mx.bfloat16),
        "blocks.0.norm.weight": mx.ones(64, mx.bfloat16),
        "blocks.0.narrow.weight": mx.array(RANDOM.normal(size=(8, 24)), mx.bfloat16),
    },
    "vae": {"decoder.conv.weight": mx.array(RANDOM.normal(size=(4, 3, 3, 64)), mx.float32)},
}
INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.35.0",
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "note": "<&>",
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    for component, tensors in TENSORS.items():
        write_folder(folder / component, tensors, {"torch_dtype": "bfloat16", "part": component})
    # Diffusers shards its weights under a name of its own.
    transformer = folder / "transformer"
    (transformer / "model.safetensors").unlink()
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": [] for n in (1, 2)}
    weight_map = {}
    for number, name in enumerate(TENSORS["transformer"]):
        shard = list(shards)[number % 2]
        shards[shard].append(name)
        weight_map[name] = shard
    for shard, names in shards.items():
        mx.save_safetensors(str(transformer / shard), {name: TENSORS["transformer"][name] for name in names})
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/merges.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def create(source: Path, store: Path, **options) -> list[str]:
    notes: list[str] = []
    create_model(CreateRequest("m", source, store, **options), note=notes.append)
    return notes


def test_components_and_files_are_read_back(pipeline, store):
    assert create(pipeline, store) == []
    checkpoint = open_checkpoint("m", store)
    for component, tensors in TENSORS.items():
        found = {tensor.name: to_mlx(tensor.value) for tensor in checkpoint.tensors(component)}
        assert set(found) == set(tensors)
        assert all(mx.array_equal(found[name], value) for name, value in tensors.items())
        assert json.loads(checkpoint.read(f"{component}/config.json") or b"")["part"] == component
    assert checkpoint.read("scheduler/scheduler_config.json") == b"{}"
    assert checkpoint.read("tokenizer/tokenizer.json") == b"{}"


def test_layers_are_called_as_ollamas_image_runner_looks_for_them(pipeline, store):
    create(pipeline, store)
    layers = manifest_of(store, "m")["layers"]
    assert [layer["name"] for layer in layers if layer["mediaType"].endswith(".tensor")] == [
        f"{component}/{name}" for component in TENSORS for name in sorted(TENSORS[component])
    ]
    assert [layer["name"] for layer in layers if layer["mediaType"].endswith(".json")] == [
        "model_index.json",
        "text_encoder/config.json",
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ]


def test_the_index_says_what_ollama_shows(pipeline, store):
    create(pipeline, store)
    count = sum(tensor.size for tensors in TENSORS.values() for tensor in tensors.values())
    assert layer_of(store, "m", "model_index.json").decode() == (
        "{\n"
        '    "architecture": "ZImagePipeline",\n'
        '    "note": "\\u003c\\u0026\\u003e",\n'
        f'    "parameter_count": {count},\n'
        '    "quantization": "bfloat16",\n'
        '    "transformer": [\n'
        '        "diffusers",\n'
        '        "ZImageTransformer2DModel"\n'
        "    ]\n"
        "}"
    )
    assert config_of(store, "m")["capabilities"] == ["image"]
    assert config_of(store, "m")["requires"] == "0.19.0"


def test_a_pipeline_that_edits_has_vision(pipeline, store):
    (pipeline / "model_index.json").write_text(json.dumps(INDEX | {"_class_name": "Flux2KleinPipeline"}))
    create(pipeline, store)
    assert config_of(store, "m")["capabilities"] == ["image", "vision"]


@pytest.mark.parametrize("quantize", ["int4", "int8", "nvfp4", "mxfp8"])
def test_linear_layers_are_quantised_and_the_vae_is_not(pipeline, store, quantize):
    create(pipeline, store, quantize=quantize)
    checkpoint = open_checkpoint("m", store)
    packed = {
        f"{component}/{tensor.name}": value.spec.mode
        for component in TENSORS
        for tensor in checkpoint.tensors(component)
        if isinstance(value := tensor.value, Packed)
    }
    mode = quantize if quantize.endswith(("fp4", "fp8")) else "affine"
    expected = {"text_encoder/model.layers.0.mlp.down_proj.weight", "transformer/blocks.0.to_q.weight"}
    assert packed == dict.fromkeys(expected, mode)
    index = json.loads(layer_of(store, "m", "model_index.json"))
    assert index["quantization"] == quantize.upper()
    assert config_of(store, "m")["file_type"] == quantize


def test_a_plain_tensor_is_called_as_in_its_component_and_a_quantised_one_as_in_the_whole(pipeline, store):
    create(pipeline, store, quantize="int8")

    def keys(layer: str) -> set[str]:
        blob = layer_of(store, "m", layer)
        return set(json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])) - {"__metadata__"}

    assert keys("transformer/blocks.0.to_q.bias") == {"blocks.0.to_q.bias"}
    name = "transformer/blocks.0.to_q.weight"
    assert keys(name) == {name, f"{name}.scale", f"{name}.bias"}


def test_a_pipeline_is_another_format_than_a_language_model(pipeline, store, parity):
    create(pipeline, store)
    with pytest.raises(StoreError, match=r"another format \(image pipeline\); --force replaces"):
        create(parity / "qwen3", store)
    create(pipeline, store)


def test_what_has_no_place_is_named(pipeline, store):
    write_folder(pipeline / "text_encoder_2", {"a": mx.ones(1)})
    assert create(pipeline, store) == ["left out, as Ollama has no place for it: text_encoder_2/"]


def test_a_pipeline_without_its_transformer_or_with_a_template_is_refused(pipeline, store, tmp_path):
    with pytest.raises(CheckpointError, match="takes no template"):
        create(pipeline, store, template="{{ .Prompt }}")
    (pipeline / "transformer").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="has no transformer"):
        create(pipeline, store)
    assert not store.exists()


def test_a_missing_shard_leaves_nothing(pipeline, store):
    (pipeline / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the file is missing"):
        create(pipeline, store)
    assert files_of(store) == {}
