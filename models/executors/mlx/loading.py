"""From a checkpoint to an executor on MLX, weight by weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from models.arch import Model
from models.arch.base import Stack
from models.checkpoint import Checkpoint
from models.executors.footprint import Footprint, by_layer
from models.executors.mlx.activations import Activations
from models.executors.mlx.executor import MLXExecutor
from models.executors.mlx.kinds import CacheType
from models.executors.mlx.rotations import Wavelengths
from models.executors.mlx.slabs import LONGEST_STEP, class_capacity, layer_specs
from models.executors.mlx.weights import Policy, Weights
from models.mlx_memory import configure
from models.ops import Embedding, weights_in
from models.quantization import packed_nbytes
from models.sources.base import TensorInfo
from models.suppressed import suppressed_tokens
from models.weights.matching import tensors_of
from models.weights.stacks import separate_tensors

_CACHE_BYTES = 128 << 20
"""Freed buffers that MLX may hold back while weights are converted one by one."""
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def compute_dtype(checkpoint_dtype: object) -> mx.Dtype:
    """The type that a model computes in: the one its configuration names on a GPU, float32 on a CPU. Thread: any."""
    if mx.default_device() != mx.Device(mx.gpu):
        return mx.float32
    return _DTYPES.get(str(checkpoint_dtype).removeprefix("torch."), mx.float16)


def load(
    checkpoint: Checkpoint,
    model: Model,
    *,
    policy: Policy = "keep",
    cache_type: CacheType = "f16",
    longest_step: int = LONGEST_STEP,
    dtype: mx.Dtype | None = None,
    depth: int | None = None,
    reach: int = 0,
    progress: Callable[[float], None] = lambda _: None,
    unused: tuple[str, ...] = (),
) -> MLXExecutor:
    """Load a model. Thread: the executor's.

    Args:
        checkpoint: where the weights are.
        model: what they are declared by.
        policy: whether quantised weights stay so.
        cache_type: how keys and values are held.
        longest_step: tokens of a row that one step runs at most.
        dtype: what is computed in; None: see `compute_dtype`.
        depth: steps under way before one is read; None: 1 on a GPU, 0 elsewhere.
        reach: tokens that a row may have; some ropes turn by it.
        progress: told 0 to 1 as weights arrive; may raise to abandon the load.
        unused: beginnings of names of tensors that nobody asks for.

    Raises:
        CheckpointError: a tensor is missing, left over, misshaped or unreadable.
        QuantizationError: weights or cache cannot be held so.
    """
    configure()
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    dtype = dtype or compute_dtype(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    specs = layer_specs(model.state, cache_type, dtype, longest_step)
    weights = load_weights(checkpoint, model, policy, dtype, progress=progress, unused=unused)
    depth = int(on_gpu) if depth is None else depth
    suppressed = () if model.is_encoder else suppressed_tokens(checkpoint, model.config.vocab_size)
    return MLXExecutor(model, weights, specs, depth, Wavelengths(reach), Activations(compiled=on_gpu), suppressed)


@dataclass(frozen=True, slots=True)
class Declared:
    """Weights that are declared, and where they are found."""

    weights: object
    found: Mapping[str, TensorInfo]
    """Tensors by declared name."""
    stacks: Sequence[Stack]


def load_weights(
    checkpoint: Checkpoint,
    model: Model,
    policy: Policy,
    dtype: mx.Dtype,
    *,
    progress: Callable[[float], None] = lambda _: None,
    unused: tuple[str, ...] = (),
) -> Weights:
    """A model's weights, one by one; the arguments and errors are those of `load`. Thread: the executor's."""
    found = tensors_of(model, checkpoint, unused)
    return filled(checkpoint, Declared(model.weights, found, model.stacks), policy, dtype, progress)


def filled(
    checkpoint: Checkpoint, declared: Declared, policy: Policy, dtype: mx.Dtype, progress: Callable[[float], None]
) -> Weights:
    """What is declared, one by one; the arguments and errors are those of `load`. Thread: the executor's."""
    found = declared.found
    tensors = {tensor.name: tensor for tensor in separate_tensors(checkpoint.tensors(), declared.stacks)}
    weights = Weights()
    total, done = sum(prod(info.shape) for info in found.values()) or 1, 0
    for weight in weights_in(declared.weights):
        names = [name for name, _ in weight.tensors()]
        weights.add(weight, {name: tensors[found[name].name].value for name in names}, policy, dtype)
        done += sum(prod(found[name].shape) for name in names)
        if mx.get_cache_memory() > _CACHE_BYTES:
            mx.clear_cache()
        progress(min(done / total, 1.0))
    mx.clear_cache()
    return weights


def footprint(
    model: Model,
    found: Mapping[str, TensorInfo],
    *,
    policy: Policy,
    cache_type: CacheType,
    longest_step: int = LONGEST_STEP,
    config_dtype: object = None,
) -> Footprint:
    """What a model will take, its tensors by declared name. Thread: any.

    Raises:
        QuantizationError: the heads cannot be held as the cache type wants.
    """
    dtype = compute_dtype(config_dtype)
    specs = layer_specs(model.state, cache_type, dtype, longest_step)
    sizes = {name: held_nbytes(info, policy, dtype) for name, info in found.items()}
    tables = {name for each in weights_in(model.weights) if isinstance(each, Embedding) for name, _ in each.tensors()}
    layers, output = by_layer(((n, size) for n, size in sizes.items() if n not in tables), model.config.num_layers)
    largest = max((4 * prod(info.shape) for info in found.values()), default=0)

    def state(tokens: int) -> tuple[int, ...]:
        return tuple(spec.nbytes(class_capacity(tokens)) if tokens else 0 for spec in specs)

    return Footprint(sum(sizes[name] for name in tables), layers, output, largest, 0, state)


def held_nbytes(info: TensorInfo, policy: Policy, dtype: mx.Dtype) -> int:
    """What is held of a tensor. Thread: any."""
    if policy == "keep" and info.quantized and info.spec is not None:
        return packed_nbytes(info.spec, info.shape, dtype.size)
    return prod(info.shape) * dtype.size
