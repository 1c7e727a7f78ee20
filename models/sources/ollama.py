"""A model of the Ollama store: a manifest that lists blobs by digest; a blob is a tensor, a group of them, or a GGUF.

Source: ollama v0.17.0 to v0.33.0-rc2, x/imagegen/manifest, x/mlxrunner/model/root.go, manifest/.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from models.errors import CheckpointError, ModelNotFoundError, QuantizationError
from models.quantization import QuantizationSpec, fitted_spec, spec_of_quant_type
from models.sources.base import JSON, Checkpoint, NamedTensor, TensorInfo
from models.sources.gguf_seeing import open_gguf
from models.sources.hf import parse_config
from models.sources.model_name import ModelName
from models.sources.safetensors_file import SafetensorsFile, open_safetensors
from models.sources.tensor_table import Member, TensorTable, make_table

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
_TENSOR = "application/vnd.ollama.image.tensor"
_CONFIG = "application/vnd.ollama.image.json"
_GGUF = "application/vnd.ollama.image.model"
_PROJECTOR = "application/vnd.ollama.image.projector"
_ADAPTER = "application/vnd.ollama.image.adapter"
_NEEDED = frozenset({_TENSOR, _CONFIG, _GGUF, _PROJECTOR})
# The key of a blob's only tensor in stores written by Ollama 0.15 and before.
_ANONYMOUS = "data"


@dataclass(frozen=True, slots=True)
class Layer:
    """One entry of the manifest; `name` is a path for configuration files and tensors, empty for others."""

    media_type: str
    digest: str
    size: int
    name: str


def open_ollama_model(
    reference: str, store: Path, projector: Path | None = None, *, verify_digests: bool = False
) -> Checkpoint:
    """Open a model of the store by its name; a GGUF file with its projector, or with that given.

    Raises:
        ModelNotFoundError: the store has no such model, or the reference is no name.
        CheckpointError: the manifest is broken, or a blob is missing, of the wrong size or, if asked, the wrong digest.
    """
    name = ModelName.parse(reference)
    path = name.manifest(store)
    if path is None:
        raise ModelNotFoundError(
            f"model {str(name)!r} not found in {store} (and {reference!r} is no file or folder); "
            f"try `ollama pull {name}`"
        )
    config, layers = _read_manifest(path, name)
    blobs = Blobs(store / "blobs", f"try `ollama pull {name}`")
    for layer in layers:
        if layer.media_type in _NEEDED:
            blobs.check(layer, verify_digest=verify_digests)
    if any(layer.media_type == _ADAPTER for layer in layers):
        raise CheckpointError("the model has an adapter (LoRA), which is not supported", file=str(path))
    ggufs = [layer for layer in layers if layer.media_type == _GGUF]
    if any(layer.media_type == _TENSOR for layer in layers):
        if projector is not None:
            raise CheckpointError("a projector file goes with a GGUF file alone", file=str(path))
        described = _described(config, blobs)
        draft = _draft_prefix(described, layers)
        return OllamaManifest(str(name), path, layers, blobs, draft, embeds=_embeds(described))
    if len(ggufs) > 1:
        raise CheckpointError("the model is split over several GGUF files, which is not supported", file=str(path))
    if not ggufs:
        raise CheckpointError("the manifest lists no weights; is it a cloud model?", file=str(path))
    projectors = [blobs.path(layer) for layer in layers if layer.media_type == _PROJECTOR]
    named = projector or (projectors[0] if projectors else None)
    return open_gguf(blobs.path(ggufs[0]), str(name), named)


def _read_manifest(path: Path, name: ModelName) -> tuple[Layer | None, list[Layer]]:
    """The layer of Ollama's own description of the model, and the others."""
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the manifest is damaged; try `ollama pull {name}`", file=str(path)) from error
    listed = manifest.get("layers") if isinstance(manifest, dict) else None
    if not isinstance(listed, list):
        raise CheckpointError(f"the manifest has no layers; try `ollama pull {name}`", file=str(path))
    layers = []
    for entry in listed:
        layer = _layer(entry)
        if layer is None:
            raise CheckpointError(
                f"the manifest has a malformed layer {json.dumps(entry)[:200]}; try `ollama pull {name}`",
                file=str(path),
            )
        layers.append(layer)
    return _layer(manifest.get("config")), layers


def _layer(entry: object) -> Layer | None:
    match entry:
        case {"mediaType": str(media_type), "digest": str(digest), "size": int(size), **rest} if _DIGEST.fullmatch(
            digest
        ):
            return Layer(media_type, digest, size, str(rest.get("name") or ""))
    return None


def _described(config: Layer | None, blobs: "Blobs") -> object:
    """Ollama's own description of the model; nothing where there is none, for nothing here needs it."""
    try:
        return json.loads(blobs.path(config).read_bytes()) if config else {}
    except (OSError, ValueError):
        return {}


def _embeds(described: object) -> bool:
    """Whether the model has the capability `embedding`. Source: ollama v0.33.0-rc2 types/model/capability.go."""
    match described:
        case {"capabilities": list(capabilities)}:
            return "embedding" in capabilities
    return False


def _draft_prefix(described: object, layers: Sequence[Layer]) -> str:
    """What the tensors of a draft model begin with, if there is one: they are no part of the model itself.

    Source: ollama v0.33.0-rc2 types/model/config.go, x/mlxrunner/model/root.go.
    """
    match described:
        case {"draft": {"tensor_prefix": str(prefix)}} if prefix:
            return prefix
        case {"draft": {}}:
            return "draft."
    return "draft." if any(each.media_type == _CONFIG and each.name == "draft/config.json" for each in layers) else ""


@dataclass(frozen=True, slots=True)
class Blobs:
    """The store's blobs; `remedy` is what a person can do about a bad one."""

    folder: Path
    remedy: str

    def path(self, layer: Layer) -> Path:
        """Where a layer's blob is."""
        return self.folder / layer.digest.replace(":", "-", 1)

    def label(self, layer: Layer) -> str:
        """What messages call it: the file, and the layer's name if it has one."""
        return f"{self.path(layer)} ({layer.name})" if layer.name else str(self.path(layer))

    def check(self, layer: Layer, *, verify_digest: bool) -> None:
        """Check that a blob is whole.

        Raises:
            CheckpointError: it is not.
        """
        path = self.path(layer)
        try:
            size = path.stat().st_size
            if size != layer.size:
                raise CheckpointError(
                    f"the blob has {size} bytes where the manifest says {layer.size}; {self.remedy}",
                    file=self.label(layer),
                )
            if verify_digest:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != layer.digest[len("sha256:") :].lower():
                    raise CheckpointError(
                        f"the blob is damaged: its SHA-256 is {digest}; remove it and {self.remedy}",
                        file=self.label(layer),
                    )
        except FileNotFoundError as error:
            raise CheckpointError(f"the blob is missing; {self.remedy}", file=self.label(layer)) from error
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", file=self.label(layer)) from error


class OllamaManifest:
    """A model whose weights are tensor blobs (see `Checkpoint`)."""

    def __init__(
        self, reference: str, path: Path, layers: Sequence[Layer], blobs: Blobs, draft: str, *, embeds: bool = False
    ) -> None:
        self.reference = reference
        self._path = path
        self._layers = layers
        self._blobs = blobs
        self._draft = draft
        self._embeds = embeds

    @cached_property
    def config(self) -> Mapping[str, JSON]:
        """See `Checkpoint.config`. A model that Ollama knows to make embeddings has `ollama_embedding`.

        Raises:
            CheckpointError: the manifest lists neither file, or it is no JSON object.
        """
        for name in ("config.json", "model_index.json"):
            text = self.read(name)
            if text is not None:
                told: dict[str, JSON] = {"ollama_embedding": True} if self._embeds else {}
                return parse_config(text, f"{self.reference}/{name}") | told
        raise CheckpointError("the manifest lists neither config.json nor model_index.json", file=str(self._path))

    @property
    def nbytes(self) -> int:
        """The bytes of all tensor blobs; a blob that serves two tensors counts once."""
        return sum({layer.digest: layer.size for layer in self._layers if layer.media_type == _TENSOR}.values())

    def read(self, name: str) -> bytes | None:
        """A configuration layer by its name.

        Raises:
            CheckpointError: its blob cannot be read.
        """
        layer = next((each for each in self._layers if each.media_type == _CONFIG and each.name == name), None)
        if layer is None:
            return None
        try:
            return self._blobs.path(layer).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", file=self._blobs.label(layer)) from error

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        """See `Checkpoint.infos`."""
        yield from self._table(component).infos()

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """See `Checkpoint.tensors`."""
        yield from self._table(component).tensors()

    def _table(self, component: str) -> TensorTable:
        prefix = f"{component}/" if component else ""
        opened: dict[str, SafetensorsFile] = {}
        members: dict[str, Member] = {}
        for layer in self._layers:
            if layer.media_type != _TENSOR or not layer.name.startswith(prefix):
                continue
            if layer.digest not in opened:
                opened[layer.digest] = open_safetensors(self._blobs.path(layer), self._blobs.label(layer))
            for name, member in _members(opened[layer.digest], layer.name):
                if component or not self._draft or not name.startswith(self._draft):
                    members[name.removeprefix(prefix)] = member
        if not members:
            what = f"has no component {component!r}" if component else "has no tensors"
            raise CheckpointError(f"the manifest {what}", file=str(self._path))
        return make_table(members, self._spec_of)

    def _spec_of(self, name: str, weight: Member, scales: Member) -> QuantizationSpec:
        quant_type, group_size = self._declared(weight)
        spec = spec_of_quant_type(quant_type, group_size) if quant_type else None
        fitted = fitted_spec(spec, weight.stored.shape, scales.stored.shape)
        if fitted is None:
            raise QuantizationError(
                f"{weight.file.label}: tensor {name}: packed weights {list(weight.stored.shape)} and scales "
                f"{list(scales.stored.shape)} do not make {quant_type or 'any known quantisation'}"
            )
        return fitted

    def _declared(self, weight: Member) -> tuple[str, int | None]:
        """The quantisation type and group size that the metadata of tensor, blob or pipeline name, nearest first."""
        metadata, key = weight.file.metadata, weight.stored.key
        quant_type = metadata.get(f"{key}.quant_type") or metadata.get("quant_type") or ""
        group_size = metadata.get(f"{key}.group_size") or metadata.get("group_size") or ""
        if not quant_type and weight.file.tensors.get(f"{key}.scale") is None:
            # Ollama to 0.16 wrote a blob a part, and the type into the pipeline's index only.
            quant_type = str(self._index.get("quantization") or "")
            group_size = str(self._index.get("group_size") or "")
        return quant_type, int(group_size) if group_size.isdecimal() and int(group_size) else None

    @cached_property
    def _index(self) -> Mapping[str, JSON]:
        text = self.read("model_index.json")
        return parse_config(text, f"{self.reference}/model_index.json") if text is not None else {}


def _members(file: SafetensorsFile, layer_name: str) -> Iterator[tuple[str, Member]]:
    """A blob's tensors by their names in the model."""
    component, slash, _ = layer_name.rpartition("/")
    for key, stored in file.tensors.items():
        name = key
        if key == _ANONYMOUS or key.startswith(f"{_ANONYMOUS}."):
            name = layer_name + key.removeprefix(_ANONYMOUS)
        elif slash and not key.startswith(f"{component}/"):
            name = f"{component}/{key}"
        yield name, Member(file, stored)
