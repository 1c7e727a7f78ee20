"""From a model's name to an engine: what it will need, whether that fits, and building it.

Owns the memory prediction and the choice of how weights are held; knows no tensor and no wire. Everything up to the
build reads headers only, so a parent that asks "would it fit?" is answered without touching a weight.

The prediction has three parts. *Weights*: every tensor at the width it will be held in. *Cache*: the whole context of
all rows if somebody asked for a context; otherwise PLANNED_TOKENS in all, for caches grow on demand and a model that
allows 131,072 tokens hardly ever gets them. *Graph*: the arrays of one step, or the largest tensor while it is
converted. Without an asked context a row may hold as much as the model allows and as fits into what is left.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from models import backend
from models.cache import CacheType
from models.checkpoint import JSON, Checkpoint, TensorInfo, open_checkpoint
from models.fingerprint import fingerprint
from models.llm import find_architecture, load_language_model
from models.llm.base import LanguageConfig, LanguageModel
from models.quantization import WeightPolicy
from models.tokenizer import load_tokenizer
from runner.config import RunnerConfig
from runner.engine.admission import Admission
from runner.engine.disk_cache import FORMAT, DiskCache
from runner.engine.loop import BuildEngine, Progress
from runner.engine.memory_limits import cgroup_headroom
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import Engine
from runner.errors import InsufficientMemory

PLANNED_TOKENS = 8192
PREFIX_CACHE_SHARE = 4
LEAST_CONTEXT = 2048
CONTEXT_STEP = 256
FLOAT32_BYTES = 4
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDING = re.compile(r"(?:^|\.)embed_tokens\.")
GIB = 2**30

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a parent asks of a load; None is the process's own choice."""

    parallel: int
    context_per_row: int | None
    batch_tokens: int | None
    cache_type: CacheType | None = None


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on the device: weights and cache by layer (the last of weights is the output layer), and the graph."""

    id: str
    backend: str
    name: str
    weights: tuple[int, ...]
    cache: tuple[int, ...]
    graph: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a load would take, in bytes, and what there is."""

    input_weights: int
    device: DeviceMemory
    available: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.input_weights + sum(self.device.weights) + sum(self.device.cache) + self.device.graph

    @property
    def fits(self) -> bool:
        """It is predicted to fit."""
        return self.total <= self.available


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A plan with the choices it rests on."""

    checkpoint: Checkpoint
    policy: WeightPolicy
    context: int
    parallel: int
    chunk: int
    cache_type: CacheType
    memory: MemoryPlan


class ModelLoader:
    """Plans and builds engines for this process. Thread: any; what `builder` returns runs in the MLX thread."""

    def __init__(self, config: RunnerConfig) -> None:
        self._config = config

    def plan(self, reference: str, options: LoadOptions) -> MemoryPlan:
        """What loading the model would take, by its headers.

        Raises:
            ModelError: there is no such model, or this package cannot run it.
        """
        return self._blueprint(reference, options).memory

    def builder(self, reference: str, options: LoadOptions) -> BuildEngine:
        """Check the model's headers and the memory, and return what builds it.

        Raises:
            ModelError: there is no such model, or this package cannot run it.
            InsufficientMemory: it is predicted not to fit, and nobody said to try all the same.
        """
        blueprint = self._blueprint(reference, options)
        _log(blueprint)
        if not blueprint.memory.fits:
            message = _refusal(blueprint)
            if self._config.check_memory:
                raise InsufficientMemory(message)
            logger.warning("loading all the same", extra={"fields": {"reason": message}})

        def build(progress: Progress) -> Engine:
            return _build(blueprint, self._config, progress)

        return build

    def _blueprint(self, reference: str, options: LoadOptions) -> Blueprint:
        checkpoint = open_checkpoint(reference, self._config.store, verify_digests=self._config.verify_digests)
        cache_type = options.cache_type or self._config.kv_cache_type
        config = find_architecture(checkpoint.config).config(checkpoint.config)
        planner = _Planner(checkpoint, config, cache_type, self._config.draft)
        asked = min((n for n in (options.context_per_row, self._config.context) if n is not None), default=None)
        chunk = min(self._config.prefill_chunk, options.batch_tokens or self._config.prefill_chunk)
        return planner.blueprint(self._config.weights, asked, options.parallel, chunk)


class _Planner:
    """The figures of one checkpoint on this device."""

    def __init__(self, checkpoint: Checkpoint, config: LanguageConfig, cache_type: CacheType, draft: int) -> None:
        self._checkpoint = checkpoint
        self._plain = config
        self._config = config.with_cache(cache_type)
        self._cache_type = cache_type
        self._draft = draft
        self._infos = tuple(checkpoint.infos())
        self._device = backend.device()
        self._available = _available_bytes(self._device)

    def blueprint(self, policy: WeightPolicy, asked: int | None, parallel: int, chunk: int) -> Blueprint:
        """The plan under `policy`; `auto` is decided here."""
        if policy != "auto":
            return self._under(policy, asked, parallel, chunk)
        if self._device.kind != "cpu":
            return self._under("keep", asked, parallel, chunk)
        widened = self._under("float32", asked, parallel, chunk)
        return widened if widened.memory.fits else self._under("keep", asked, parallel, chunk)

    def _under(self, policy: WeightPolicy, asked: int | None, parallel: int, chunk: int) -> Blueprint:
        layers = [0] * (self._config.num_layers + 1)
        embedding = 0
        for info in self._infos:
            size = self._held_nbytes(info, policy)
            if EMBEDDING.search(info.name):
                embedding += size
            else:
                found = LAYER.search(info.name)
                layers[min(int(found[1]), len(layers) - 1) if found else -1] += size
        graph = self._graph_nbytes(policy, parallel, chunk)
        context = self._context(asked, self._available - embedding - sum(layers) - graph)
        tokens = context if asked is not None else max(1, min(context, PLANNED_TOKENS) // parallel)
        cache = tuple(parallel * nbytes for nbytes in self._cache_nbytes(tokens))
        device = DeviceMemory("0", self._device.kind, self._device.name, tuple(layers), cache, graph)
        memory = MemoryPlan(input_weights=embedding, device=device, available=self._available)
        return Blueprint(self._checkpoint, policy, context, parallel, chunk, self._cache_type, memory)

    def _context(self, asked: int | None, room: int) -> int:
        """Tokens one row may hold: what was asked or, bounded by the room, the model's limit."""
        limit = self._config.context_length
        if asked is not None:
            return min(asked, limit)
        per_token = max(1, sum(self._cache_nbytes(CONTEXT_STEP)) // CONTEXT_STEP)
        fitting = room // per_token // CONTEXT_STEP * CONTEXT_STEP
        return min(limit, max(fitting, LEAST_CONTEXT))

    def _cache_nbytes(self, tokens: int) -> list[int]:
        """One row's cache, a number a layer; the CPU computes in float32, a GPU in half precision."""
        return self._config.cache_nbytes_per_layer(tokens, itemsize=self._itemsize)

    @property
    def _itemsize(self) -> int:
        return FLOAT32_BYTES if self._device.kind == "cpu" else 2

    def _graph_nbytes(self, policy: WeightPolicy, parallel: int, chunk: int) -> int:
        """The arrays of one step of a full batch in prefill, or the largest tensor while it is converted.

        The factors are counts of the arrays alive together: hidden states, the MLP's three, the scores and their
        softmax for PLANNED_TOKENS keys, the logits with their sorted and normalised copies.
        """
        config = self._checkpoint.config
        hidden = _integer(config, "hidden_size", 4096)
        step = chunk * (8 * hidden + 3 * _integer(config, "intermediate_size", 4 * hidden))
        keys = min(self._config.context_length, PLANNED_TOKENS)
        step += 2 * chunk * keys * _integer(config, "num_attention_heads", 32)
        step += 4 * parallel * (1 + self._draft) * self._config.vocab_size
        if self._cache_type != "f16":
            # Each layer's in turn is dequantised for its attention.
            step += max(self._plain.cache_nbytes_per_layer(keys, itemsize=self._itemsize)) // FLOAT32_BYTES
        largest = max((info.nbytes + self._held_nbytes(info, policy) for info in self._infos), default=0)
        return max(FLOAT32_BYTES * step, largest)

    def _held_nbytes(self, info: TensorInfo, policy: WeightPolicy) -> int:
        """The bytes of a tensor once loaded: the CPU computes in float32 but for weights that stay quantised."""
        if self._device.kind != "cpu" and policy != "float32":
            return info.nbytes
        return info.nbytes if info.quantized and policy == "keep" else math.prod(info.shape) * FLOAT32_BYTES


def _integer(config: Mapping[str, JSON], key: str, default: int) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else default


def _build(blueprint: Blueprint, config: RunnerConfig, progress: Progress) -> Engine:
    """Load the model. Thread: the MLX thread."""
    backend.configure()
    try:
        model = load_language_model(
            blueprint.checkpoint, policy=blueprint.policy, cache_type=blueprint.cache_type, progress=progress
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise InsufficientMemory(f"insufficient memory while loading ({error}); {_remedy(blueprint)}") from error
        raise
    if blas := backend.prepare(threads=config.threads).blas:
        logger.info("threads settled", extra={"fields": {"blas": blas.name, "threads": blas.settle()}})
    return TextEngine(
        model,
        load_tokenizer(blueprint.checkpoint),
        context_length=blueprint.context,
        parallel=blueprint.parallel,
        prefill_chunk=blueprint.chunk,
        prefix_cache=_prefix_cache(blueprint, config, type(model).__name__),
        admission=_admission(blueprint, model) if config.check_memory else None,
        draft=config.draft,
    )


def _admission(blueprint: Blueprint, model: LanguageModel) -> Admission:
    working = blueprint.memory.device.graph
    return Admission(model.cache_nbytes, _free_bytes, working_bytes=working, give_back=backend.give_back)


def _free_bytes() -> int:
    """What this process may still take, with what MLX keeps for it. Thread: any."""
    return _available_bytes(backend.device()) + mx.get_cache_memory()


def _available_bytes(device: backend.Device) -> int:
    room = cgroup_headroom()
    return device.available_bytes if room is None else min(device.available_bytes, room)


def _prefix_cache(blueprint: Blueprint, config: RunnerConfig, form: str) -> PrefixCache | None:
    limit = config.cache_bytes
    if limit is None:
        limit = max(0, blueprint.memory.available - blueprint.memory.total) // PREFIX_CACHE_SHARE
    logger.info("prefix cache", extra={"fields": {"limit_mib": limit >> 20}})
    if not limit:
        return None
    return PrefixCache(limit, _disk_cache(blueprint, config, form))


def _disk_cache(blueprint: Blueprint, config: RunnerConfig, form: str) -> DiskCache | None:
    """The files of this model in this form; None if nobody asked for them, or they cannot be kept."""
    if config.cache_dir is None:
        return None
    model = fingerprint(
        blueprint.checkpoint, FORMAT, form, blueprint.policy, blueprint.cache_type, blueprint.memory.device.backend
    )
    try:
        disk = DiskCache(config.cache_dir, model[:32], limit_bytes=config.cache_dir_bytes)
    except OSError as error:
        # Whoever waits for an answer does not care.
        logger.warning("the prefix cache is not kept on disk", extra={"fields": {"reason": str(error)}})
        return None
    logger.info("prefix cache on disk", extra={"fields": {"folder": str(config.cache_dir / model[:32])}})
    return disk


def _log(blueprint: Blueprint) -> None:
    memory = blueprint.memory
    logger.info(
        "memory plan",
        extra={
            "fields": {
                "model": blueprint.checkpoint.reference,
                "device": memory.device.name,
                "weights_held": "float32" if blueprint.policy == "float32" else "as stored",
                "weights_mib": (memory.input_weights + sum(memory.device.weights)) >> 20,
                "cache_type": blueprint.cache_type,
                "cache_mib": sum(memory.device.cache) >> 20,
                "graph_mib": memory.device.graph >> 20,
                "available_mib": memory.available >> 20,
                "context": blueprint.context,
                "parallel": blueprint.parallel,
            }
        },
    )


def _remedy(blueprint: Blueprint) -> str:
    keep = "--weights=keep, " if blueprint.policy == "float32" else ""
    cache = "--kv-cache-type=q8_0, " if blueprint.cache_type == "f16" else ""
    return f"choose a smaller or quantised model, {keep}{cache}a smaller --context or --parallel"


def _refusal(blueprint: Blueprint) -> str:
    memory = blueprint.memory
    weights = memory.input_weights + sum(memory.device.weights)
    return (
        f"insufficient memory: {blueprint.checkpoint.reference} needs {memory.total / GIB:.1f} GiB "
        f"(weights {weights / GIB:.1f}, cache {sum(memory.device.cache) / GIB:.1f}, "
        f"working space {memory.device.graph / GIB:.1f}) and {memory.available / GIB:.1f} GiB are available; "
        f"{_remedy(blueprint)}, or --check-memory=false to try all the same"
    )
