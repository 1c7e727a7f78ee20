"""Writers of small checkpoints: an Ollama store as Ollama lays it out."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest

TENSOR = "application/vnd.ollama.image.tensor"
CONFIG = "application/vnd.ollama.image.json"


@dataclass
class StoreWriter:
    """Writes blobs and one manifest into a store."""

    store: Path
    layers: list[dict[str, object]] = field(default_factory=list)

    def blob(self, media_type: str, data: bytes, name: str = "") -> Path:
        digest = hashlib.sha256(data).hexdigest()
        path = self.store / "blobs" / f"sha256-{digest}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        layer = {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
        self.layers.append(layer | ({"name": name} if name else {}))
        return path

    def tensors(self, name: str, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> Path:
        scratch = self.store / "scratch.safetensors"
        scratch.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(scratch), arrays, metadata)
        data = scratch.read_bytes()
        scratch.unlink()
        return self.blob(TENSOR, data, name)

    def json(self, name: str, value: object) -> Path:
        return self.blob(CONFIG, json.dumps(value).encode(), name)

    def manifest(
        self, path: str = "registry.ollama.ai/library/tiny/latest", config: Mapping[str, object] | None = None
    ) -> Path:
        description = {"model_format": "safetensors"} | dict(config or {})
        self.blob("application/vnd.docker.container.image.v1+json", json.dumps(description).encode())
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": self.layers.pop(),
            "layers": self.layers,
        }
        file = self.store / "manifests" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(manifest))
        return file


@pytest.fixture
def store_writer(tmp_path: Path) -> StoreWriter:
    return StoreWriter(tmp_path / "store")
