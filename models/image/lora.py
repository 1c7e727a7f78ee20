"""LoRA files: small matrices that change a pipeline's weights, merged into them while they are loaded.

Each layer of a file has two matrices, A (rank, in) and B (out, rank); its weight W becomes W + scale * alpha / rank *
B A, computed in float32. Several files add up. A matrix that stays quantised is dequantised, changed and quantised
again in its own way: no layer needs a second path, and what rounding takes from the change it takes from W as well.

A key that has no place in the pipeline is an error, for a file made for another model would otherwise change nothing
and say nothing.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import mlx.core as mx
import numpy as np

from models.checkpoint import JSON, Checkpoint, NamedTensor, Packed, Tensor, TensorInfo
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.image.base import Lora
from models.image.lora_names import Place, places, split_component
from models.quantization import Blocks, dequantize
from models.sources.hf import parse_config
from models.sources.safetensors_file import FLOATING, SafetensorsFile, StoredTensor, open_safetensors
from models.to_mlx import PackedArrays, dequantized, from_mlx, packed_from_mlx, packed_to_mlx, to_mlx

_HALF = re.compile(r"(?P<layer>.+)\.lora_(?P<half>A|B|down|up)(?:\.default(?:_\d+)?)?\.weight")
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
_NUMBERS = FLOATING | {"I32", "I64"}
# Where diffusers writes the adapter's configuration in a file's header, and PEFT beside the file of this name.
_METADATA = "lora_adapter_metadata"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_OTHER_KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"lora_magnitude_vector|dora_scale", "DoRA"),
        (r"\.lokr_", "LoKr"),
        (r"\.hada_", "LoHa"),
        (r"\.lora_(B|up)\.(.+\.)?bias$", "a LoRA with biases"),
        (r"\.diff(_b)?$", "a full difference"),
    )
)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a file has for one layer; the name is that in its component."""

    component: str
    name: str
    down: StoredTensor
    up: StoredTensor
    alpha: StoredTensor | None

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.down.shape[0]


class LoraFile:
    """A file whose header is understood. Thread: any, but for `change`."""

    def __init__(self, lora: Lora) -> None:
        """Open it.

        Raises:
            CheckpointError: it is no LoRA, or one of a kind that cannot be merged.
        """
        self._scale = lora.scale
        self._file: SafetensorsFile = open_safetensors(lora.path, str(lora.path))
        self.label = self._file.label
        self.layers = tuple(self._read_layers())
        if not self.layers:
            raise CheckpointError("is no LoRA: no key of it ends in lora_A.weight or lora_down.weight", file=self.label)

    def change(self, layer: _Layer) -> mx.array:
        """What the layer adds to its weight. Shape: float32 (out, in), lazy. Thread: the MLX thread."""
        down, up = (to_mlx(self._file.array(part)).astype(mx.float32) for part in (layer.down, layer.up))
        return (self._scale * self._strength(layer)) * (up @ down)

    def _strength(self, layer: _Layer) -> float:
        """Alpha over the rank: as the file's own tensor says, or the adapter's configuration, else 1."""
        if layer.alpha is not None:
            return float(self._file.array(layer.alpha).astype(np.float32).reshape(())) / layer.rank
        settings = self._settings(layer.component)
        alpha = settings.number("lora_alpha", float(layer.rank))
        for pattern, own in settings.mapping("alpha_pattern").items():
            if re.fullmatch(rf"(?:.*\.)?{pattern}", layer.name):
                alpha = ConfigReader({pattern: own}, self.label).number(pattern)
        rank_stabilised = settings.flag("use_rslora", default=False)
        return alpha / (math.sqrt(layer.rank) if rank_stabilised else layer.rank)

    def _settings(self, component: str) -> ConfigReader:
        prefix = f"{component}."
        mine = {
            key.removeprefix(prefix): value for key, value in self._adapter_settings.items() if key.startswith(prefix)
        }
        return ConfigReader(mine or self._adapter_settings, self.label)

    @cached_property
    def _adapter_settings(self) -> Mapping[str, JSON]:
        if text := self._file.metadata.get(_METADATA):
            return parse_config(text.encode(), f"{self.label}: {_METADATA}")
        beside = self._file.path.with_name(_PEFT_CONFIG)
        if self._file.path.name == _PEFT_FILE and beside.is_file():
            return parse_config(beside.read_bytes(), str(beside))
        return {}

    def _read_layers(self) -> Iterator[_Layer]:
        halves: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
        alphas: dict[str, StoredTensor] = {}
        for key, stored in self._file.tensors.items():
            if match := _HALF.fullmatch(key):
                half = "down" if match["half"] in {"A", "down"} else "up"
                if half in halves[match["layer"]]:
                    raise self._wrong(stored, "is there twice, under two names")
                halves[match["layer"]][half] = stored
            elif match := _ALPHA.fullmatch(key):
                alphas[match["layer"]] = stored
            else:
                kind = next((kind for pattern, kind in _OTHER_KINDS if pattern.search(key)), None)
                raise self._wrong(stored, f"is of {kind}, which cannot be merged" if kind else "is no part of a LoRA")
        for layer, found in halves.items():
            yield self._checked(layer, found, alphas.pop(layer, None))
        for stored in alphas.values():
            raise self._wrong(stored, "belongs to no layer of the file")

    def _checked(self, layer: str, found: Mapping[str, StoredTensor], alpha: StoredTensor | None) -> _Layer:
        down, up = found.get("down"), found.get("up")
        if down is None or up is None:
            raise self._wrong(next(iter(found.values())), "is only half of a LoRA: the other matrix is missing")
        for stored in (down, up):
            if stored.dtype not in FLOATING or len(stored.shape) != 2:
                raise self._wrong(stored, f"is {stored.dtype} {list(stored.shape)}, and a matrix of floats is wanted")
        if down.shape[0] != up.shape[1] or not down.shape[0]:
            raise self._wrong(up, f"its shape {list(up.shape)} does not fit that of its other half {list(down.shape)}")
        if alpha is not None and (alpha.dtype not in _NUMBERS or math.prod(alpha.shape) != 1):
            raise self._wrong(alpha, "is not one number")
        return _Layer(*split_component(layer), down, up, alpha)

    def wrong(self, layer: _Layer, reason: str) -> CheckpointError:
        """An error that names the file and one of the layer's keys."""
        return self._wrong(layer.down, reason)

    def _wrong(self, stored: StoredTensor, reason: str) -> CheckpointError:
        return CheckpointError(reason, file=self.label, tensor=stored.key)


@dataclass(frozen=True, slots=True)
class _Change:
    """A layer of a file and where it goes."""

    file: LoraFile
    layer: _Layer
    place: Place

    def rows(self) -> mx.array:
        """What is added to the weight there. Shape: float32 (out, in). Thread: the MLX thread."""
        whole = self.file.change(self.layer)
        rows = whole.shape[0] // self.place.parts
        return whole[self.place.part * rows : (self.place.part + 1) * rows]


class MergedCheckpoint:
    """A pipeline whose tensors of one component have LoRA files merged into them (see `Checkpoint`)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        component: str,
        loras: Sequence[Lora],
        *,
        dtype: mx.Dtype | None,
        requantize: bool,
    ) -> None:
        """Find out where the files' layers go.

        Args:
            checkpoint: the pipeline.
            component: the one that will be read.
            loras: the files.
            dtype: what a changed dense matrix is yielded in; None is what it was.
            requantize: whether a quantised matrix is to be quantised again once it is changed.

        Raises:
            CheckpointError: a file is no LoRA, or a layer of it has no place in the component.
        """
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._requantize = requantize
        self._changes = _changes(checkpoint, component, [LoraFile(lora) for lora in loras])
        self.reference = checkpoint.reference
        self.config = checkpoint.config

    @property
    def nbytes(self) -> int:
        """See `Checkpoint.nbytes`."""
        return self._checkpoint.nbytes

    def read(self, name: str) -> bytes | None:
        """See `Checkpoint.read`."""
        return self._checkpoint.read(name)

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        """See `Checkpoint.infos`."""
        return self._checkpoint.infos(component)

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """See `Checkpoint.tensors`. Thread: the MLX thread where a changed tensor's value is asked for."""
        for tensor in self._checkpoint.tensors(component):
            changes = self._changes.get(tensor.name)
            yield replace(tensor, read=partial(self._merged, tensor, changes)) if changes else tensor

    def _merged(self, tensor: NamedTensor, changes: Sequence[_Change]) -> Tensor:
        value = tensor.value
        if isinstance(value, Packed):
            packed = packed_to_mlx(value)
            dense = _changed(dequantized(packed, mx.float32), changes)
            return packed_from_mlx(_quantized_like(packed, dense)) if self._requantize else from_mlx(dense)
        if isinstance(value, Blocks):
            return from_mlx(_changed(to_mlx(dequantize(value)), changes))
        plain = to_mlx(value)
        return from_mlx(_changed(plain.astype(mx.float32), changes).astype(self._dtype or plain.dtype))


def _changed(dense: mx.array, changes: Sequence[_Change]) -> mx.array:
    for change in changes:
        dense = dense + change.rows()
    return dense


def check_loras(checkpoint: Checkpoint, components: Sequence[str], loras: Sequence[Lora]) -> None:
    """Check by headers alone that every layer of every file has its place. Thread: any.

    Raises:
        CheckpointError: a file is no LoRA, or a layer of it has no place in the pipeline.
    """
    files = [LoraFile(lora) for lora in loras]
    for file in files:
        for layer in file.layers:
            if layer.component not in components:
                raise file.wrong(layer, f"is for a {layer.component}, which this pipeline has not")
    for component in components if files else ():
        _changes(checkpoint, component, files)


def _changes(checkpoint: Checkpoint, component: str, files: Sequence[LoraFile]) -> dict[str, list[_Change]]:
    """The changes of a component's tensors by name. Raises CheckpointError."""
    shapes = {info.name: info.shape for info in checkpoint.infos(component) if info.name.endswith(".weight")}
    known = places(name.removesuffix(".weight") for name in shapes)
    changes: defaultdict[str, list[_Change]] = defaultdict(list)
    for file in files:
        taken: set[str] = set()
        for layer in (each for each in file.layers if each.component == component):
            found = known.get(layer.name)
            if found is None:
                raise file.wrong(layer, f"matches nothing in the {component} of {checkpoint.reference}")
            for place in found:
                name = f"{place.layer}.weight"
                wanted = (place.parts * shapes[name][0], *shapes[name][1:])
                if (layer.up.shape[0], layer.down.shape[1]) != wanted:
                    raise file.wrong(layer, f"makes a change of {_made(layer)}, and {name} takes {list(wanted)}")
                if name in taken:
                    raise file.wrong(layer, f"changes {name}, which another key of the file changes as well")
                taken.add(name)
                changes[name].append(_Change(file, layer, place))
    return changes


def _made(layer: _Layer) -> list[int]:
    return [layer.up.shape[0], layer.down.shape[1]]


def _quantized_like(packed: PackedArrays, dense: mx.array) -> PackedArrays:
    """The matrix in the same quantisation, its scales of the same type."""
    spec = packed.spec
    if packed.global_scale is not None:
        dense = dense / packed.global_scale.astype(mx.float32).reshape(())
    # The scales are chosen in the type that they are kept in, so that the codes are right for them.
    source = dense.astype(packed.scales.dtype) if spec.mode == "affine" else dense
    weight, scales, *biases = mx.quantize(source, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    return PackedArrays(weight, scales, biases[0] if biases else None, spec, packed.global_scale)
