"""Writes models into an Ollama store for tests, in the form that Ollama's own `create` gives them.

As a command it adds a checkpoint under a name: `python -m tests.ollama.store STORE NAME FOLDER|FILE.gguf`.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import save_file

from models.quantization import dequantize

IMAGE = "application/vnd.ollama.image"
DOCKER = "application/vnd.docker"
CONFIG_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


@dataclass(frozen=True)
class Store:
    """A folder as OLLAMA_MODELS names it."""

    folder: Path

    def add(self, name, source, *, template=CHATML, system="", parameters=None, capabilities=("completion",), **config):
        """Add a Hugging Face folder or GGUF file. `config` overrides fields of Ollama's own description of a model."""
        from models.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(str(source), self.folder)
        layers = [self._tensor(tensor) for tensor in checkpoint.tensors()]
        for file in CONFIG_FILES:
            text = json.dumps(checkpoint.config).encode() if file == "config.json" else checkpoint.read(file)
            if text is not None:
                layers.append(self._blob(text, f"{IMAGE}.json", file))
        layers += self._texts(template, system, parameters)
        described = {
            "model_format": "safetensors",
            "model_family": checkpoint.config["model_type"],
            "capabilities": list(capabilities),
            **config,
        }
        self._write_manifest(name, described, layers)

    def add_gguf(self, name, file, *, template=CHATML, system="", parameters=None, **more):
        """Add a GGUF file as it is, as the classic parent's models are; `more` are files of other kinds of layer."""
        layers = [self._blob(file, f"{IMAGE}.model"), *self._texts(template, system, parameters)]
        layers += [self._blob(other, f"{IMAGE}.{kind}") for kind, other in more.items()]
        family = GGUFReader(file).fields["general.architecture"].contents()
        self._write_manifest(name, {"model_format": "gguf", "model_family": family, "model_families": [family]}, layers)

    def add_image(self, name, **config):
        """Add what a parent takes for an image pipeline; it has no weights."""
        index = json.dumps({"_class_name": "ZImagePipeline", "architecture": "ZImagePipeline"}).encode()
        described = {"model_format": "safetensors", "capabilities": ["image"], **config}
        layers = [self._blob(index, f"{IMAGE}.json", "model_index.json")]
        self._write_manifest(name, described, layers)

    def manifest(self, name):
        """The manifest's file."""
        model, _, tag = name.partition(":")
        return self.folder / "manifests" / "registry.ollama.ai" / "library" / model / (tag or "latest")

    def blob(self, name, layer):
        """The file of a model's layer, by its name or, where it has none, its kind (`model`)."""
        layers = json.loads(self.manifest(name).read_text())["layers"]
        named = {each.get("name", each["mediaType"].split(".")[-1]): each["digest"] for each in layers}
        return self.folder / "blobs" / named[layer].replace(":", "-")

    def _texts(self, template, system, parameters):
        """The layers of what is not the model's own."""
        texts = {"template": template, "system": system, "params": json.dumps(parameters) if parameters else ""}
        return [self._blob(text.encode(), f"{IMAGE}.{kind}") for kind, text in texts.items() if text]

    def _tensor(self, tensor):
        value = tensor.value
        value = value if isinstance(value, np.ndarray) else dequantize(value).astype(np.float16)
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            save_file({tensor.name: value}, file.name)
            return self._blob(Path(file.name), f"{IMAGE}.tensor", tensor.name)

    def _blob(self, content, media_type, name=""):
        if isinstance(content, bytes):
            digest, size = hashlib.sha256(content).hexdigest(), len(content)
        else:
            with content.open("rb") as file:
                digest, size = hashlib.file_digest(file, "sha256").hexdigest(), content.stat().st_size
        target = self.folder / "blobs" / f"sha256-{digest}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)
        layer = {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}
        return {**layer, "name": name} if name else layer

    def _write_manifest(self, name, described, layers):
        config = self._blob(json.dumps(described).encode(), f"{DOCKER}.container.image.v1+json")
        target = self.manifest(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest = {"schemaVersion": 2, "mediaType": f"{DOCKER}.distribution.manifest.v2+json"}
        target.write_text(json.dumps({**manifest, "config": config, "layers": layers}))


def with_context(source, target, tokens):
    """A copy of a GGUF file with another length of context."""
    shutil.copyfile(source, target)
    reader = GGUFReader(target, "r+")
    family = reader.fields["general.architecture"].contents()
    reader.fields[f"{family}.context_length"].parts[-1][0] = tokens
    reader.data.flush()
    return target


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("name")
    parser.add_argument("source", type=Path)
    asked = parser.parse_args()
    Store(asked.store).add(asked.name, asked.source)


if __name__ == "__main__":
    main()
