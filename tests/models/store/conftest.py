"""Sources of models to create, and what a store holds."""

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest

from models.store import CreateRequest, create_model


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def manifest_of(store: Path, name: str) -> dict:
    return json.loads((store / "manifests/registry.ollama.ai/library" / name / "latest").read_text())


def blob_of(store: Path, layer: Mapping[str, str]) -> bytes:
    return (store / "blobs" / layer["digest"].replace(":", "-")).read_bytes()


def config_of(store: Path, name: str) -> dict:
    return json.loads(blob_of(store, manifest_of(store, name)["config"]))


def layer_of(store: Path, name: str, wanted: str) -> bytes:
    """A layer's content by its name, or by the end of its media type."""
    layers = manifest_of(store, name)["layers"]
    return blob_of(
        store, next(each for each in layers if wanted in (each.get("name"), each["mediaType"].split(".")[-1]))
    )


def write_folder(
    folder: Path, tensors: Mapping[str, mx.array], config: Mapping[str, object] | None = None, **files
) -> Path:
    """A folder with a config.json, one safetensors file, and further JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tensors))
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | dict(config or {})
    (folder / "config.json").write_text(json.dumps(described))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def create(source: Path, store: Path, name: str = "m", **options) -> list[str]:
    """The notes."""
    notes: list[str] = []
    create_model(CreateRequest(name, source, store, **options), note=notes.append)
    return notes


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"
