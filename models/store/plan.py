"""Which blobs a safetensors model becomes, decided from headers alone.

A tensor is a blob of its own; a quantised matrix is one blob of its parts; the experts of a layer are stacked and, if
they are quantised alike, share a blob.

Source: ollama v0.34.4 create/plan.go and create/prequant.go; v0.24.0 x/create/imagegen.go for pipelines.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from models.errors import CheckpointError, QuantizationError
from models.quantization import fitted_spec, spec_of_quant_type
from models.sources.safetensors_file import DTYPE_BITS, FLOATING
from models.sources.tensor_table import BlocksEntry, DenseEntry, Member, QuantizedEntry, TensorTable
from models.store.content import Entry, safetensors_header

# The quantisation of a tensor by its name in its component and its shape.
QuantizeRule = Callable[[str, tuple[int, ...]], str | None]

_EXPERT = re.compile(
    r"(?P<group>(?:model\.language_model\.|language_model(?:\.model)?\.|model\.)?layers\.\d+"
    r"\.(?:mlp\.experts|mlp\.shared_experts|mlp\.switch_mlp|moe\.experts))\.(?P<index>\d+)\.(?P<projection>.+)\.weight"
)
_QUANT_TYPE_OF = {
    ("affine", 4): "int4",
    ("affine", 8): "int8",
    ("nvfp4", 4): "nvfp4",
    ("mxfp4", 4): "mxfp4",
    ("mxfp8", 8): "mxfp8",
}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor to be written: stored data one after another, quantised if `quant_type` says so."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Member, ...]
    quant_type: str | None = None

    def entries(self) -> list[Entry]:
        """What stands for it in the blob's header: itself, or its quantised parts."""
        if self.quant_type is None:
            return [Entry(self.name, self.dtype, self.shape, sum(member.stored.nbytes for member in self.sources))]
        spec = spec_of_quant_type(self.quant_type, None)
        *rows, columns = self.shape
        affine = spec.mode == "affine"
        parts = [("", "U32", columns * spec.bits // 32), (".scale", self.dtype if affine else "U8", 0)]
        parts += [(".bias", self.dtype, 0)] if affine else []
        entries = []
        for suffix, dtype, width in parts:
            shape = (*rows, width or columns // spec.group_size)
            entries.append(Entry(self.name + suffix, dtype, shape, _nbytes(dtype, shape)))
        return entries


@dataclass(frozen=True, slots=True)
class PlannedBlob:
    """One blob to be written; `name` is its layer's, `metadata` what its header says of its quantisation."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    metadata: Mapping[str, str]

    def entries(self) -> list[Entry]:
        """The tensors of the blob's header, in the order of their data."""
        return [entry for tensor in self.tensors for entry in tensor.entries()]

    @property
    def size(self) -> int:
        """The bytes the blob will have."""
        entries = self.entries()
        return len(safetensors_header(entries, self.metadata)) + sum(entry.nbytes for entry in entries)


@dataclass(frozen=True, slots=True)
class Plan:
    """The blobs of a model or component. `quant_type` is what all quantised weights are, empty if none or mixed."""

    blobs: tuple[PlannedBlob, ...]
    quant_type: str
    elements: int


def plan_blobs(
    table: TensorTable, rule: QuantizeRule | None = None, *, requested: str = "", component: str = ""
) -> Plan:
    """Plan the blobs of a language model, or of a component of a pipeline.

    Args:
        table: the stored tensors.
        rule: what to quantise; None keeps everything as it is.
        requested: the quantisation that was asked for, for the plan's summary.
        component: names the layers of a pipeline.

    Raises:
        CheckpointError: experts do not fit together, or a type cannot be read back.
        QuantizationError: the source is quantised already and more is asked, or in a way that has no name in the store.
    """
    if rule is not None and not all(isinstance(entry, DenseEntry) for entry in table.entries.values()):
        raise QuantizationError("the model is quantised already; create it without --quantize")
    prefix = f"{component}/" if component else ""
    blobs: list[PlannedBlob] = []
    experts: dict[str, list[tuple[re.Match[str], Member]]] = defaultdict(list)
    for name in sorted(table.entries):
        entry = table.entries[name]
        match = _EXPERT.fullmatch(name) if not component else None
        if isinstance(entry, BlocksEntry):
            blobs.append(_mxfp4_blob(prefix + name, entry))
        elif isinstance(entry, QuantizedEntry):
            blobs.append(_packed_blob(prefix + name, entry))
        elif match is not None:
            experts[match["group"]].append((match, entry.values))
        else:
            blobs.append(_dense_blob(prefix, name, entry, rule))
    for group in sorted(experts):
        blobs += _expert_blobs(group, experts[group], rule)
    kinds = {blob.metadata.get("quant_type", "") for blob in blobs if blob.metadata}
    return Plan(tuple(blobs), requested or (kinds.pop() if len(kinds) == 1 else ""), _elements(table))


def _dense_blob(prefix: str, name: str, entry: DenseEntry, rule: QuantizeRule | None) -> PlannedBlob:
    stored = entry.values.stored
    quant_type = _quant_type(name, entry.values, stored.shape, rule)
    # In a pipeline a plain tensor is called as in its component, and a quantised one as in the whole.
    inner = name if quant_type is None else prefix + name
    tensor = PlannedTensor(inner, stored.dtype, stored.shape, (entry.values,), quant_type)
    return PlannedBlob(prefix + name, (tensor,), _metadata([tensor]))


def _quant_type(name: str, member: Member, shape: tuple[int, ...], rule: QuantizeRule | None) -> str | None:
    dtype = member.stored.dtype
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"its type {dtype} is not supported", file=member.file.label, tensor=name)
    return rule(name, shape) if rule is not None and dtype in FLOATING else None


def _expert_blobs(
    group: str, members: Sequence[tuple[re.Match[str], Member]], rule: QuantizeRule | None
) -> list[PlannedBlob]:
    projections: dict[str, dict[int, Member]] = defaultdict(dict)
    for match, member in members:
        projections[match["projection"]][int(match["index"])] = member
    tensors = []
    counts = {len(experts) for experts in projections.values()}
    for projection in sorted(projections):
        experts = projections[projection]
        first = next(iter(experts.values()))
        ordered = [experts[index] for index in sorted(experts)]
        name = f"{group}.{projection}.weight"
        if sorted(experts) != list(range(len(experts))) or len(counts) != 1:
            raise CheckpointError("some of its experts are missing", file=first.file.label, tensor=name)
        if any((each.stored.dtype, each.stored.shape) != (first.stored.dtype, first.stored.shape) for each in ordered):
            raise CheckpointError("its experts differ in shape", file=first.file.label, tensor=name)
        shape = (len(ordered), *first.stored.shape)
        quant_type = _quant_type(name, first, shape, rule)
        tensors.append(PlannedTensor(name, first.stored.dtype, shape, tuple(ordered), quant_type))
    if len({tensor.quant_type for tensor in tensors}) == 1:
        return [PlannedBlob(group, tuple(tensors), _metadata(tensors))]
    return [PlannedBlob(tensor.name, (tensor,), _metadata([tensor])) for tensor in tensors]


def _packed_blob(name: str, entry: QuantizedEntry) -> PlannedBlob:
    """A matrix that is quantised already, its parts called as Ollama calls them."""
    parts = {"": entry.weight, ".scale": entry.scales, ".bias": entry.biases, ".global_scale": entry.global_scale}
    tensors = tuple(
        PlannedTensor(name + suffix, member.stored.dtype, member.stored.shape, (member,))
        for suffix, member in parts.items()
        if member is not None
    )
    return PlannedBlob(name, tensors, _metadata_of(name, entry))


def _mxfp4_blob(name: str, entry: BlocksEntry) -> PlannedBlob:
    """OpenAI's bytes are those of the store's mxfp4; only the words they are counted in differ."""
    *outer, groups, nbytes = entry.blocks.stored.shape
    weight = PlannedTensor(name, "U32", (*outer, groups * nbytes // 4), (entry.blocks,))
    scale = PlannedTensor(f"{name}.scale", "U8", entry.scales.stored.shape, (entry.scales,))
    return PlannedBlob(name, (weight, scale), {"quant_type": "mxfp4", "group_size": "32"})


def _metadata_of(name: str, entry: QuantizedEntry) -> dict[str, str]:
    spec = entry.spec
    quant_type = _QUANT_TYPE_OF.get((spec.mode, spec.bits))
    if quant_type is not None:
        return {"quant_type": quant_type, "group_size": str(spec.group_size)}
    # Nothing names these; what reads them goes by the shapes.
    if fitted_spec(None, entry.weight.stored.shape, entry.scales.stored.shape) != spec:
        raise QuantizationError(
            f"{entry.weight.file.label}: tensor {name} has {spec.bits} bits in groups of {spec.group_size}, which the "
            "Ollama store cannot tell from another quantisation"
        )
    return {}


def _metadata(tensors: Sequence[PlannedTensor]) -> dict[str, str]:
    quant_type = tensors[0].quant_type
    if quant_type is None:
        return {}
    return {"quant_type": quant_type, "group_size": str(spec_of_quant_type(quant_type, None).group_size)}


def _elements(table: TensorTable) -> int:
    return sum(math.prod(info.shape) for info in table.infos() if info.shape)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
