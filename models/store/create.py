"""Creating a model: plan, check, write the blobs, publish the manifest."""

import errno
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import ModelNotFoundError, StoreError
from models.sources.base import JSON
from models.sources.model_name import ModelName
from models.sources.ollama import Layer
from models.store.blobs import StoreWriter, manifest_path, read_manifest, store_writer
from models.store.content import Content
from models.store.go_json import go_json
from models.store.planned import TENSOR, ModelKind, PlannedModel
from models.store.sources import plan_model
from models.store.tensor_blob import tensor_blob

_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
_KINDS: dict[ModelKind, str] = {"gguf": "GGUF", "safetensors": "safetensors", "image": "image pipeline"}
# What the manifest, its folders and the file system's own books may take.
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What to create: a name, where from, and how."""

    name: str
    source: Path
    store: Path
    quantize: str | None = None
    """One of QUANT_TYPES; None keeps the weights as they are."""
    template: str | None = None
    """A Go template; None finds one, or the renderer that Ollama has for the model."""
    force: bool = False
    """Replace a model of another format."""


@dataclass(frozen=True, slots=True)
class Created:
    """What was created: the full name, and the bytes and number of its layers."""

    name: str
    nbytes: int
    layers: int


def create_model(
    request: CreateRequest,
    *,
    progress: Callable[[float], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> Created:
    """Write a model into the store. Whatever ends it early, nothing of it stays. Thread: the MLX thread.

    Args:
        request: what to create.
        progress: called with 0 to 1.
        note: called with what a person should know.

    Raises:
        StoreError: the name is none, another format's, or the store cannot be written.
        CheckpointError: the source is missing, incomplete or damaged.
        QuantizationError: it cannot be quantised as asked.
    """
    name = _parse_name(request.name)
    planned = plan_model(request.source, quantize=request.quantize, template=request.template)
    for line in planned.notes:
        note(line)
    try:
        _check_format(name, planned.kind, request)
        with store_writer(request.store, note) as writer:
            _check_format(name, planned.kind, request)
            return _write(writer, name, planned, request.store, progress)
    except OSError as error:
        raise _store_error(error, request.store) from error


def _parse_name(text: str) -> ModelName:
    try:
        return ModelName.parse(text)
    except ModelNotFoundError as error:
        raise StoreError(f"{text!r} is no model name (a name is [[host/]namespace/]name[:tag])") from error


def _check_format(name: ModelName, kind: ModelKind, request: CreateRequest) -> None:
    path = manifest_path(name, request.store)
    if request.force or not path.exists():
        return
    existing = _kind_of(path, request.store)
    if existing == kind:
        return
    what = f"a model of another format ({_KINDS[existing]})" if existing else "a model whose description is damaged"
    raise StoreError(f"{name} is already there and is {what}; --force replaces it with this {_KINDS[kind]} model")


def _kind_of(manifest: Path, store: Path) -> ModelKind | None:
    match read_manifest(manifest):
        case {"config": {"digest": str(digest)}}:
            described = read_manifest(store / "blobs" / digest.replace(":", "-", 1))
        case _:
            described = None
    match described:
        case {"capabilities": [*capabilities]} if "image" in capabilities:
            return "image"
        case {"model_format": "gguf"}:
            return "gguf"
        case {"model_format": "safetensors"}:
            return "safetensors"
    return None


def _write(
    writer: StoreWriter, name: ModelName, planned: PlannedModel, store: Path, progress: Callable[[float], None]
) -> Created:
    sizes = [*(blob.size for blob in planned.blobs), *(layer.content.size for layer in planned.layers)]
    _check_space(store, sum(sizes), writer.reusable_bytes(sizes))
    gauge = _Gauge(sum(sizes), progress)
    layers = [writer.add(tensor_blob(blob), TENSOR, blob.name, gauge.advance) for blob in planned.blobs]
    layers += [writer.add(each.content, each.media_type, each.name, gauge.advance) for each in planned.layers]
    described: dict[str, JSON] = dict(planned.config)
    config = writer.add(Content((go_json(described) + b"\n",)), _CONFIG_TYPE)
    writer.publish(name, config, layers)
    return Created(str(name), _nbytes([config, *layers]), len(layers))


def _nbytes(layers: Sequence[Layer]) -> int:
    return sum({layer.digest: layer.size for layer in layers}.values())


class _Gauge:
    """Bytes done of all bytes, as a fraction."""

    def __init__(self, total: int, progress: Callable[[float], None]) -> None:
        self._total = max(total, 1)
        self._done = 0
        self._progress = progress

    def advance(self, count: int) -> None:
        self._done += count
        self._progress(min(1.0, self._done / self._total))


def _check_space(store: Path, needed: int, reusable: int) -> None:
    free = shutil.disk_usage(store).free
    missing = needed - reusable + _SPARE_BYTES
    if missing > free:
        raise StoreError(
            f"not enough space in {store}: the model needs {missing / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free"
        )


def _store_error(error: OSError, store: Path) -> StoreError:
    where = error.filename or store
    remedy = ""
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        remedy = "; run this as the user who owns the store, or name another with --store"
    elif error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        remedy = "; make room, or name a store on another disk with --store"
    return StoreError(f"{where}: the store cannot be written: {error.strerror}{remedy}")
