"""From a checkpoint's tensors to a model's parameters.

Owns the strict comparison of names and shapes, the choice between quantised and dense weights, and the order of
reading that keeps the peak near the size of the model. Knows nothing of files, which are `models.sources`' matter, and
nothing of architectures: an attribute of a module is called what the checkpoint calls its tensor.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from models.device import device
from models.errors import CheckpointError
from models.quantization import Blocks, Tensor, WeightPolicy, dequantize, keeps_quantized, packed_nbytes
from models.sources.base import JSON, Checkpoint, TensorInfo
from models.sources.gguf_blocks import as_packed
from models.to_mlx import PackedArrays, dequantized, packed_to_mlx, to_mlx

_log = logging.getLogger(__name__)

# Freed buffers that MLX may hold back while weights are converted one by one.
_CACHE_BYTES = 128 * 2**20
_SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What `load_weights` did. `nbytes` is what the parameters now hold."""

    tensors: int
    nbytes: int
    kept_quantized: int
    dequantized: int
    ignored: tuple[str, ...]


def planned_nbytes(infos: Iterable[TensorInfo], *, keep_quantized: bool, dense_dtype: mx.Dtype | None) -> int:
    """The bytes that these tensors will take once loaded, from their headers alone. Thread: any.

    `dense_dtype` None keeps dense tensors as stored; quantised ones that are not kept become float32 then.
    """
    return sum(_loaded_nbytes(info, keep_quantized=keep_quantized, dense_dtype=dense_dtype) for info in infos)


def _loaded_nbytes(info: TensorInfo, *, keep_quantized: bool, dense_dtype: mx.Dtype | None) -> int:
    if info.spec is not None and keep_quantized:
        if dense_dtype is None and info.kind == info.spec.mode:
            return info.nbytes
        # Of GGML's blocks the scales are float16, and so are the zero points that MLX's layout has besides.
        return packed_nbytes(info.spec, info.shape, dense_dtype.size if dense_dtype is not None else mx.float16.size)
    if info.quantized or dense_dtype is not None:
        return math.prod(info.shape) * (dense_dtype or mx.float32).size
    return info.nbytes


def stored_dtype(config: Mapping[str, JSON]) -> mx.Dtype | None:
    """The type that a configuration names for its weights; None if it names none that MLX computes in.

    For a GPU: there it is what dense tensors should be cast to, because some sources hold a few tensors in another type
    (GGUF its norms, and the block formats that MLX has no kernel for) and would draw all arithmetic to float32.
    """
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    dtypes = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
    return dtypes.get(name)


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    component: str = "",
    policy: WeightPolicy = "auto",
    dense_dtype: mx.Dtype | None = None,
    available_bytes: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
    unused: tuple[str, ...] = (),
) -> WeightReport:
    """Give every parameter of `model` its tensor and evaluate it, one after another.

    Names and shapes are compared before the first byte of data is read. Parameters whose attribute begins with `_` are
    the architecture's own and left alone. Thread: the MLX thread.

    Args:
        model: its parameters are replaced; where weights stay quantised, so are the layers that own them.
        checkpoint: where from.
        component: which part of a pipeline.
        policy: whether quantised weights stay so; `auto` decides by device and memory (`keeps_quantized`).
        dense_dtype: what dense tensors, and scales of quantised ones, are cast to; None keeps them as stored.
        available_bytes: the memory that `auto` may count on; None asks the system.
        progress: called with 0 to 1 after each tensor. What it raises ends the load.
        unused: beginnings of names, without a leading `model.`, that may lack a parameter.

    Raises:
        CheckpointError: a tensor is missing, extra, misshaped or unreadable.
        QuantizationError: a tensor is quantised in an unknown way.
    """
    infos = list(checkpoint.infos(component))
    names = _match(model, infos, checkpoint.reference, unused)
    wanted = [info for info in infos if info.name in names]
    needed = planned_nbytes(wanted, keep_quantized=False, dense_dtype=dense_dtype)
    here = device()
    available = here.available_bytes if available_bytes is None else available_bytes
    keep = keeps_quantized(policy, here.kind, needed, available)
    total, kept, done, nbytes = sum(math.prod(info.shape) for info in wanted) or 1, 0, 0, 0
    for tensor in checkpoint.tensors(component):
        if tensor.name not in names:
            continue
        owner = _Owner.of(model, names[tensor.name])
        value = _to_mlx(tensor.value)
        shape = value.shape
        if keep and isinstance(value, PackedArrays) and owner.can_hold(value):
            arrays = owner.set_packed(value, dense_dtype)
            kept += 1
        else:
            arrays = [owner.set_dense(value, dense_dtype)]
        del value
        _evaluate(arrays)
        nbytes += sum(array.nbytes for array in arrays)
        done += math.prod(shape)
        progress(min(done / total, 1.0))
    mx.clear_cache()
    ignored = tuple(sorted(info.name for info in infos if info.name not in names))
    report = WeightReport(len(wanted), nbytes, kept, sum(info.quantized for info in wanted) - kept, ignored)
    _log.debug("weights loaded: %s", report)
    return report


def _to_mlx(value: Tensor) -> mx.array | PackedArrays:
    """Blocks that MLX's layout has no room for become dense."""
    if isinstance(value, Blocks):
        value = as_packed(value) or dequantize(value)
    return to_mlx(value) if isinstance(value, np.ndarray) else packed_to_mlx(value)


def _evaluate(arrays: list[mx.array]) -> None:
    mx.eval(arrays)
    if mx.get_cache_memory() > _CACHE_BYTES:
        mx.clear_cache()


def _match(model: nn.Module, infos: list[TensorInfo], reference: str, unused: tuple[str, ...]) -> dict[str, str]:
    """The parameter of each tensor. Raises CheckpointError unless they pair off completely."""
    parameters = {name: array.shape for name, array in _flat(model)}
    names: dict[str, str] = {}
    missing = dict.fromkeys(parameters)
    for info in infos:
        # A base model without a head was saved without the prefix; a model with one may be wanted without its head.
        bare = info.name.removeprefix("model.")
        target = next((name for name in (info.name, f"model.{info.name}", bare) if name in parameters), None)
        if target is None:
            if not is_unused(info.name, unused) and not _is_harmless(info.name, parameters):
                raise CheckpointError("the architecture has no such tensor", file=info.file, tensor=info.name)
            continue
        if target not in missing:
            raise CheckpointError("is there twice", file=info.file, tensor=info.name)
        if info.shape != parameters[target]:
            raise CheckpointError(
                f"its shape is {list(info.shape)}, and config.json asks for {list(parameters[target])}",
                file=info.file,
                tensor=info.name,
            )
        del missing[target]
        names[info.name] = target
    if missing:
        absent = list(missing)
        more = f" (and {len(absent) - 1} more: {', '.join(absent[1:_SHOWN_NAMES])}, ...)" if len(absent) > 1 else ""
        raise CheckpointError(f"is missing{more}", file=reference, tensor=absent[0])
    return names


def _flat(module: nn.Module) -> list[tuple[str, mx.array]]:
    flat = tree_flatten(module.parameters())
    assert isinstance(flat, list)
    return flat


def is_unused(name: str, unused: tuple[str, ...]) -> bool:
    """Whether a tensor is one that may lack a parameter (see `load_weights`). Thread: any."""
    return name.removeprefix("model.").startswith(unused)


def _is_harmless(name: str, parameters: dict[str, tuple[int, ...]]) -> bool:
    """Whether a tensor without a parameter may be passed over: a constant we compute, or the copy of a tied matrix."""
    if name.endswith(("rotary_emb.inv_freq", ".attn.masked_bias", ".num_batches_tracked")):
        return True
    return name == "lm_head.weight" and not any(each.startswith("lm_head.") for each in parameters)


@dataclass(frozen=True, slots=True)
class _Owner:
    """Where a parameter lives: the module that has it, and the module or list that has that module."""

    parent: nn.Module | list[nn.Module] | dict[str, nn.Module] | None
    key: str
    module: nn.Module
    attribute: str

    @classmethod
    def of(cls, model: nn.Module, path: str) -> "_Owner":
        *steps, attribute = path.split(".")
        parent, key, module = None, "", model
        for step in steps:
            parent, key = module, step
            module = module[int(step)] if isinstance(module, list) else module[step]
        return cls(parent, key, module, attribute)

    def can_hold(self, packed: PackedArrays) -> bool:
        """Whether the layer has a quantised kind that these weights fit."""
        if self.parent is None or self.attribute != "weight":
            return False
        return type(self.module) is nn.Linear or (type(self.module) is nn.Embedding and packed.global_scale is None)

    def set_dense(self, value: mx.array | PackedArrays, dtype: mx.Dtype | None) -> mx.array:
        if isinstance(value, PackedArrays):
            array = dequantized(value, dtype or mx.float32)
        else:
            cast = dtype is not None and mx.issubdtype(value.dtype, mx.floating)
            array = value.astype(dtype) if cast and dtype is not None else value
        if isinstance(self.module, list):
            self.module[int(self.attribute)] = array
        else:
            self.module[self.attribute] = array
        return array

    def set_packed(self, value: PackedArrays, dtype: mx.Dtype | None) -> list[mx.array]:
        """Replace the layer by its quantised kind and return the arrays it now has."""
        layer = quantized_layer(self.module, value, dtype)
        if isinstance(self.parent, list):
            self.parent[int(self.key)] = layer
        elif self.parent is not None:
            self.parent[self.key] = layer
        return [array for name, array in _flat(layer) if name != "bias"]


class ScaledQuantizedLinear(nn.QuantizedLinear):
    """A quantised layer whose weights have one more factor in common, as NVIDIA's nvfp4 has."""

    global_scale: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: x (..., in), returns (..., out)."""
        y = mx.quantized_matmul(
            x,
            self.weight,
            scales=self.scales,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        y = y * self.global_scale.astype(y.dtype)
        return y + self.bias if "bias" in self else y


def quantized_layer(layer: nn.Module, packed: PackedArrays, dtype: mx.Dtype | None) -> nn.Module:
    """The quantised kind of a Linear or Embedding, with these weights and the layer's own bias.

    Affine scales are cast to `dtype`: the kernels compute in the type that inputs and scales have in common.
    """
    spec = packed.spec
    rows, columns = packed.shape
    quantized: nn.QuantizedLinear | nn.QuantizedEmbedding
    if isinstance(layer, nn.Embedding):
        assert packed.global_scale is None
        quantized = nn.QuantizedEmbedding(rows, columns, spec.group_size, spec.bits, spec.mode)
    else:
        kind = nn.QuantizedLinear if packed.global_scale is None else ScaledQuantizedLinear
        quantized = kind(columns, rows, False, spec.group_size, spec.bits, spec.mode)  # noqa: FBT003 - positional upstream
        if "bias" in layer:
            quantized.bias = layer.bias
    cast = spec.mode == "affine" and dtype is not None
    quantized.weight = packed.weight
    quantized.scales = packed.scales.astype(dtype or mx.float32) if cast else packed.scales
    if packed.biases is not None:
        quantized.biases = packed.biases.astype(dtype or mx.float32) if cast else packed.biases
    if packed.global_scale is not None:
        quantized.global_scale = packed.global_scale.reshape(())
    return quantized
