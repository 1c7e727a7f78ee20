"""The tensors of a set of safetensors files, with the parts of each quantised matrix put together under one name.

Three naming conventions for the parts are in use, and a checkpoint may mix them:

| weight | scales | biases | global scale | written by |
|---|---|---|---|---|
| `X.weight` | `X.scales` | `X.biases` | | MLX |
| `N` | `N.scale` | `N.bias` | `N.global_scale` | Ollama (N is the tensor's whole name, `X.weight`) |
| `N` | `N_scale` | `N_qbias` | | Ollama to 0.16 |
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from models.errors import CheckpointError, QuantizationError
from models.quantization import Packed, QuantizationSpec, logical_shape, shapes_agree
from models.sources.base import NamedTensor, TensorInfo
from models.sources.safetensors_file import FLOATING, SafetensorsFile, StoredTensor


@dataclass(frozen=True, slots=True)
class Member:
    """A stored tensor and the file it is in."""

    file: SafetensorsFile
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class DenseEntry:
    """A tensor stored as it is."""

    values: Member


@dataclass(frozen=True, slots=True)
class QuantizedEntry:
    """The stored parts of one quantised matrix."""

    weight: Member
    scales: Member
    biases: Member | None
    global_scale: Member | None
    spec: QuantizationSpec


# The spec of a quantised matrix, from its name, packed weights and scales.
SpecRule = Callable[[str, Member, Member], QuantizationSpec]


@dataclass(frozen=True, slots=True)
class TensorTable:
    """The tensors of one component by name, and where each is stored."""

    entries: Mapping[str, DenseEntry | QuantizedEntry]

    def infos(self) -> Iterator[TensorInfo]:
        """What the headers say of every tensor."""
        for name, entry in self.entries.items():
            if isinstance(entry, DenseEntry):
                stored = entry.values.stored
                yield TensorInfo(name, stored.shape, stored.nbytes, quantized=False, file=entry.values.file.label)
            else:
                weight = entry.weight.stored
                nbytes = sum(part.stored.nbytes for part in _parts(entry))
                shape = logical_shape(entry.spec, weight.shape)
                yield TensorInfo(name, shape, nbytes, quantized=True, file=entry.weight.file.label, spec=entry.spec)

    def tensors(self) -> Iterator[NamedTensor]:
        """Every tensor, lazy. A file stays open only while arrays of it wait to be taken. Thread: the MLX thread."""
        # An older store may give one stored tensor to two names. An array that no name waits for is let go: once
        # evaluated it holds its data, whoever else has been given a copy.
        waiting = Counter(
            (part.file.path, part.stored.key) for entry in self.entries.values() for part in _parts(entry)
        )
        opened: dict[Path, dict[str, mx.array]] = {}

        def take(member: Member) -> mx.array:
            path, key = member.file.path, member.stored.key
            if path not in opened:
                opened[path] = {name: array for name, array in member.file.arrays().items() if waiting[path, name]}
            waiting[path, key] -= 1
            array = opened[path][key] if waiting[path, key] else opened[path].pop(key)
            if not opened[path]:
                del opened[path]
            return array

        for name, entry in self.entries.items():
            if isinstance(entry, DenseEntry):
                yield NamedTensor(name, take(entry.values), entry.values.file.label)
            else:
                packed = Packed(
                    take(entry.weight),
                    take(entry.scales),
                    take(entry.biases) if entry.biases else None,
                    entry.spec,
                    take(entry.global_scale) if entry.global_scale else None,
                )
                yield NamedTensor(name, packed, entry.weight.file.label)


def _parts(entry: DenseEntry | QuantizedEntry) -> list[Member]:
    if isinstance(entry, DenseEntry):
        return [entry.values]
    return [part for part in (entry.weight, entry.scales, entry.biases, entry.global_scale) if part is not None]


def make_table(members: Mapping[str, Member], spec_of: SpecRule) -> TensorTable:
    """Put the parts of quantised matrices together.

    Raises:
        CheckpointError: a part contradicts the others.
        QuantizationError: a tensor is quantised in a way that is not MLX's.
    """
    grouped: dict[str, DenseEntry | QuantizedEntry] = {}
    consumed: set[str] = set()
    for name, member in members.items():
        parts = _companions(name, members)
        scales = members.get(parts.scales) if parts else None
        if parts is None or scales is None or member.stored.dtype != "U32":
            continue
        biases, global_scale = members.get(parts.biases), members.get(parts.global_scale)
        spec = spec_of(name, member, scales)
        entry = QuantizedEntry(member, scales, biases, global_scale, spec)
        _verify(name, entry)
        grouped[name] = entry
        consumed.update({name, parts.scales, parts.biases, parts.global_scale})
    for name, member in members.items():
        if name not in consumed:
            _refuse_foreign(name, member)
            grouped[name] = DenseEntry(member)
    return TensorTable(grouped)


@dataclass(frozen=True, slots=True)
class _CompanionNames:
    scales: str
    biases: str
    global_scale: str


def _companions(name: str, members: Mapping[str, Member]) -> _CompanionNames | None:
    candidates = [
        _CompanionNames(f"{name}.scale", f"{name}.bias", f"{name}.global_scale"),
        _CompanionNames(f"{name}_scale", f"{name}_qbias", f"{name}_scale_2"),
    ]
    if name.endswith(".weight"):
        layer = name.removesuffix(".weight")
        candidates.append(_CompanionNames(f"{layer}.scales", f"{layer}.biases", ""))
    return next((each for each in candidates if each.scales in members), None)


def _verify(name: str, entry: QuantizedEntry) -> None:
    weight, scales = entry.weight.stored, entry.scales.stored
    file = entry.weight.file.label
    if not shapes_agree(entry.spec, weight.shape, scales.shape):
        raise CheckpointError(
            f"packed weights {list(weight.shape)} and scales {list(scales.shape)} do not make {entry.spec.mode} with "
            f"{entry.spec.bits} bits in groups of {entry.spec.group_size}",
            file=file,
            tensor=name,
        )
    if entry.spec.mode == "affine":
        biases = entry.biases.stored if entry.biases else None
        if biases is None or biases.shape != scales.shape or {biases.dtype, scales.dtype} - FLOATING:
            raise CheckpointError(
                "affine quantisation needs floating scales and biases of one shape", file=file, tensor=name
            )
    elif entry.biases is not None or scales.dtype not in {"U8", "F8_E4M3", "F8_E8M0"}:
        raise CheckpointError(
            f"{entry.spec.mode} quantisation needs 8-bit scales and no biases", file=file, tensor=name
        )
    scale = entry.global_scale.stored if entry.global_scale else None
    if scale is not None and (scale.dtype not in FLOATING or math.prod(scale.shape) != 1):
        raise CheckpointError("its global scale is not one floating number", file=file, tensor=name)


def _refuse_foreign(name: str, member: Member) -> None:
    stored = member.stored
    if stored.dtype.startswith("F8") or stored.dtype in {"F4", "F6_E2M3", "F6_E3M2"}:
        raise QuantizationError(
            f"{member.file.label}: tensor {name} is stored as {stored.dtype}, which is not MLX's quantisation; use the "
            "model's bfloat16 files, or a version converted for MLX"
        )
    if name.endswith(".weight") and len(stored.shape) >= 2 and stored.dtype not in FLOATING:
        raise QuantizationError(
            f"{member.file.label}: tensor {name} is stored as {stored.dtype} without scales, so it cannot be read"
        )
