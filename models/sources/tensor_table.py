"""The tensors of a set of safetensors files, with the parts of each quantised matrix put together under one name.

Three naming conventions for the parts are in use, and a checkpoint may mix them:

| weight | scales | biases | global scale | written by |
|---|---|---|---|---|
| `X.weight` | `X.scales` | `X.biases` | | MLX |
| `N` | `N.scale` | `N.bias` | `N.global_scale` | Ollama (N is the tensor's whole name, `X.weight`) |
| `N` | `N_scale` | `N_qbias` | | Ollama to 0.16 |

and OpenAI's for experts in mxfp4: `N_blocks` (..., out, in / 32, 16 bytes) with `N_scales`, which are MLX's layout but
for the type of the words.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from models.errors import CheckpointError, QuantizationError
from models.quantization import Array, Packed, QuantizationSpec, Tensor, logical_shape, shapes_agree
from models.sources.base import Mapped, NamedTensor, TensorInfo
from models.sources.safetensors_file import FLOATING, SafetensorsFile, StoredTensor

_MXFP4 = QuantizationSpec("mxfp4", 4, 32)


@dataclass(frozen=True, slots=True)
class Member:
    """A stored tensor and the file it is in."""

    file: SafetensorsFile
    stored: StoredTensor

    def read(self) -> Array:
        """Its value. Raises CheckpointError."""
        return self.file.array(self.stored)

    def view(self) -> Array:
        """A view of its value. Raises CheckpointError."""
        return self.file.mapped(self.stored)

    def mapped(self) -> Mapped:
        """The same as a tensor. Raises CheckpointError."""
        return Mapped(self.view())

    @property
    def divided(self) -> tuple[Callable[[int], Tensor] | None, int]:
        """How to read one entry of the first axis, and how many there are."""
        shape = self.stored.shape
        return (self.read_entry, shape[0]) if len(shape) > 1 else (None, 0)

    def read_entry(self, index: int) -> Array:
        """One entry of its first axis. Raises CheckpointError."""
        return self.file.array(self.stored.entry(index))


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

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what they stand for."""
        return logical_shape(self.spec, self.weight.stored.shape)

    @property
    def parts(self) -> tuple[Member, ...]:
        """All parts that there are."""
        parts = (self.weight, self.scales, self.biases, self.global_scale)
        return tuple(part for part in parts if part is not None)

    def read(self) -> Packed:
        """Its value. Raises CheckpointError."""
        biases = self.biases.read() if self.biases else None
        global_scale = self.global_scale.read() if self.global_scale else None
        return Packed(self.weight.read(), self.scales.read(), biases, self.spec, global_scale)

    def mapped(self) -> Mapped:
        """A view of its value. Raises CheckpointError."""
        biases = self.biases.view() if self.biases else None
        global_scale = self.global_scale.read() if self.global_scale else None
        return Mapped(Packed(self.weight.view(), self.scales.view(), biases, self.spec, global_scale))

    @property
    def divided(self) -> tuple[Callable[[int], Tensor] | None, int]:
        """How to read one entry of the first axis, and how many there are."""
        shape = self.weight.stored.shape
        return (self.read_entry, shape[0]) if len(shape) > 2 else (None, 0)

    def read_entry(self, index: int) -> Packed:
        """One matrix of a stack of them. Raises CheckpointError."""
        biases = self.biases.read_entry(index) if self.biases else None
        scale = self.global_scale.read().reshape(-1) if self.global_scale else None
        own = scale if scale is None or len(scale) == 1 else scale[index : index + 1]
        return Packed(self.weight.read_entry(index), self.scales.read_entry(index), biases, self.spec, own)


@dataclass(frozen=True, slots=True)
class BlocksEntry:
    """Matrices in mxfp4 as OpenAI stores them."""

    blocks: Member
    scales: Member
    spec: QuantizationSpec = _MXFP4

    @property
    def parts(self) -> tuple[Member, ...]:
        """Both parts."""
        return self.blocks, self.scales

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what they stand for."""
        *outer, groups, nbytes = self.blocks.stored.shape
        return (*outer, groups * nbytes * 2)

    def read(self) -> Packed:
        """Its value. Raises CheckpointError."""
        return _packed_blocks(self.blocks.read(), self.scales.read())

    def mapped(self) -> Mapped:
        """A view of its value. Raises CheckpointError."""
        return Mapped(_packed_blocks(self.blocks.view(), self.scales.view()))

    def read_entry(self, index: int) -> Packed:
        """One matrix of a stack of them. Raises CheckpointError."""
        return _packed_blocks(self.blocks.read_entry(index), self.scales.read_entry(index))


def _packed_blocks(blocks: Array, scales: Array) -> Packed:
    words = np.ascontiguousarray(blocks).reshape(*blocks.shape[:-2], -1).view("<u4")
    return Packed(words, scales, None, _MXFP4)


# The spec of a quantised matrix, from its name, packed weights and scales.
SpecRule = Callable[[str, Member, Member], QuantizationSpec]


@dataclass(frozen=True, slots=True)
class TensorTable:
    """The tensors of one component by name, and where each is stored."""

    entries: Mapping[str, DenseEntry | QuantizedEntry | BlocksEntry]

    def infos(self) -> Iterator[TensorInfo]:
        """What the headers say of every tensor."""
        for name, entry in self.entries.items():
            if isinstance(entry, DenseEntry):
                stored, file = entry.values.stored, entry.values.file.label
                yield TensorInfo(name, stored.shape, stored.nbytes, quantized=False, file=file, kind=stored.dtype)
            else:
                nbytes, file = sum(part.stored.nbytes for part in entry.parts), entry.parts[0].file.label
                spec, kind = entry.spec, entry.spec.mode
                own = TensorInfo(name, entry.shape, nbytes, quantized=True, file=file, kind=kind, spec=spec)
                yield replace(own, mapped=entry.mapped) if kind == "mxfp4" else own

    def tensors(self) -> Iterator[NamedTensor]:
        """Every tensor, each read when its value is asked for; no file stays open. Thread: any."""
        for name, entry in self.entries.items():
            if isinstance(entry, DenseEntry):
                values = entry.values
                yield NamedTensor(name, values.read, values.file.label, *values.divided, values.mapped)
            elif isinstance(entry, BlocksEntry):
                label = entry.blocks.file.label
                yield NamedTensor(name, entry.read, label, entry.read_entry, entry.shape[0], entry.mapped)
            else:
                yield NamedTensor(name, entry.read, entry.weight.file.label, *entry.divided, entry.mapped)


def make_table(members: Mapping[str, Member], spec_of: SpecRule) -> TensorTable:
    """Put the parts of quantised matrices together.

    Raises:
        CheckpointError: a part contradicts the others.
        QuantizationError: a tensor is quantised in a way that is not MLX's.
    """
    grouped: dict[str, DenseEntry | QuantizedEntry | BlocksEntry] = {}
    consumed: set[str] = set()
    for name, member in members.items():
        scales = members.get(f"{name.removesuffix('_blocks')}_scales") if name.endswith("_blocks") else None
        if scales is not None:
            _verify_blocks(name, member, scales)
            grouped[name] = BlocksEntry(member, scales)
            consumed.update({name, scales.stored.key})
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
    counts = {1, math.prod(weight.shape[:-2])}
    if scale is not None and (scale.dtype not in FLOATING or math.prod(scale.shape) not in counts):
        raise CheckpointError("its global scale is not one floating number a matrix", file=file, tensor=name)


def _verify_blocks(name: str, blocks: Member, scales: Member) -> None:
    shape = blocks.stored.shape
    is_mxfp4 = len(shape) > 2 and shape[-1] == 16 and scales.stored.shape == shape[:-1]
    if not is_mxfp4 or {blocks.stored.dtype, scales.stored.dtype} != {"U8"}:
        raise CheckpointError(
            f"blocks {list(shape)} and scales {list(scales.stored.shape)} do not make mxfp4",
            file=blocks.file.label,
            tensor=name,
        )


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
