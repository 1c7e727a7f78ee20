"""A text model's figures, and its engine.

Owns the memory prediction and the choice of how weights and cache are held; knows no tensor and no wire.

The prediction has three parts. *Weights*: every tensor at the width it will be held in. *Cache*: the whole context of
all rows if somebody asked for a context; otherwise PLANNED_TOKENS in all, for caches grow on demand and a model that
allows 131,072 tokens hardly ever gets them. *Graph*: the arrays of one step, or the largest tensor while it is
converted. Without an asked context a row may hold as much as the model allows and as fits into what is left.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from models import backend
from models.cache import CacheType
from models.checkpoint import JSON, Checkpoint
from models.fingerprint import fingerprint
from models.llm import find_architecture, load_language_model
from models.llm.base import LanguageConfig, LanguageModel
from models.quantization import WeightPolicy
from models.tokenizer import load_tokenizer
from runner.config import RunnerConfig
from runner.engine.admission import Admission
from runner.engine.blueprint import (
    FLOAT32_BYTES,
    GIB,
    DeviceMemory,
    LoadOptions,
    MemoryPlan,
    allocation_failures,
    held_nbytes,
    settle_threads,
)
from runner.engine.disk_cache import FORMAT, DiskCache
from runner.engine.loop import Progress
from runner.engine.memory_limits import available_bytes, free_bytes
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import Engine
from runner.errors import LoadError

PLANNED_TOKENS = 8192
PREFILL_CHUNK = {"cpu": 64, "metal": 512, "cuda": 512}
"""On a CPU more hardly makes a prompt faster, and less lets others speak sooner (measured: 5 to 8 % below 256)."""
PREFIX_CACHE_SHARE = 4
LEAST_CONTEXT = 2048
CONTEXT_STEP = 256
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDING = re.compile(r"(?:^|\.)embed_tokens\.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextBlueprint:
    """A text model's plan with the choices it rests on (see `memory_plan.Blueprint`)."""

    config: RunnerConfig
    checkpoint: Checkpoint
    policy: WeightPolicy
    context: int
    parallel: int
    chunk: int
    cache_type: CacheType
    memory: MemoryPlan

    def fields(self) -> dict[str, object]:
        """See `Blueprint.fields`."""
        memory = self.memory
        return {
            "model": self.checkpoint.reference,
            "device": memory.device.name,
            "weights_held": "float32" if self.policy == "float32" else "as stored",
            "weights_mib": memory.weights >> 20,
            "cache_type": self.cache_type,
            "cache_mib": sum(memory.device.cache) >> 20,
            "graph_mib": memory.device.graph >> 20,
            "available_mib": memory.available >> 20,
            "context": self.context,
            "parallel": self.parallel,
        }

    def refusal(self) -> str:
        """See `Blueprint.refusal`."""
        memory = self.memory
        return (
            f"insufficient memory: {self.checkpoint.reference} needs {memory.total / GIB:.1f} GiB "
            f"(weights {memory.weights / GIB:.1f}, cache {sum(memory.device.cache) / GIB:.1f}, "
            f"working space {memory.device.graph / GIB:.1f}) and {memory.available / GIB:.1f} GiB are available; "
            f"{self._remedy()}, or --check-memory=false to try all the same"
        )

    def build(self, progress: Progress) -> Engine:
        """See `Blueprint.build`."""
        backend.configure()
        with allocation_failures(self._remedy()):
            model = load_language_model(
                self.checkpoint, policy=self.policy, cache_type=self.cache_type, progress=progress
            )
        settle_threads(self.config.threads)
        return TextEngine(
            model,
            load_tokenizer(self.checkpoint),
            context_length=self.context,
            parallel=self.parallel,
            prefill_chunk=self.chunk,
            prefix_cache=self._prefix_cache(type(model).__name__),
            admission=self._admission(model) if self.config.check_memory else None,
            draft=self.config.draft,
        )

    def _admission(self, model: LanguageModel) -> Admission:
        working = self.memory.device.graph
        return Admission(model.cache_nbytes, free_bytes, working_bytes=working, give_back=backend.give_back)

    def _prefix_cache(self, form: str) -> PrefixCache | None:
        limit = self.config.cache_bytes
        if limit is None:
            limit = max(0, self.memory.available - self.memory.total) // PREFIX_CACHE_SHARE
        logger.info("prefix cache", extra={"fields": {"limit_mib": limit >> 20}})
        if not limit:
            return None
        return PrefixCache(limit, self._disk_cache(form))

    def _disk_cache(self, form: str) -> DiskCache | None:
        """The files of this model in this form; None if nobody asked for them, or they cannot be kept."""
        if self.config.cache_dir is None:
            return None
        model = fingerprint(self.checkpoint, FORMAT, form, self.policy, self.cache_type, self.memory.device.backend)
        try:
            disk = DiskCache(self.config.cache_dir, model[:32], limit_bytes=self.config.cache_dir_bytes)
        except OSError as error:
            # Whoever waits for an answer does not care.
            logger.warning("the prefix cache is not kept on disk", extra={"fields": {"reason": str(error)}})
            return None
        logger.info("prefix cache on disk", extra={"fields": {"folder": str(self.config.cache_dir / model[:32])}})
        return disk

    def _remedy(self) -> str:
        keep = "--weights=keep, " if self.policy == "float32" else ""
        cache = "--kv-cache-type=q8_0, " if self.cache_type == "f16" else ""
        return f"choose a smaller or quantised model, {keep}{cache}a smaller --context or --parallel"


def plan_text(checkpoint: Checkpoint, config: RunnerConfig, options: LoadOptions) -> TextBlueprint:
    """Plan a text model's load.

    Raises:
        ModelError: this package cannot run it.
        LoadError: it was asked to be loaded as only pipelines can be.
    """
    if config.loras:
        raise LoadError(f"{checkpoint.reference} is a text model, and --lora is for image pipelines; leave it out")
    cache_type = options.cache_type or config.kv_cache_type
    architecture = find_architecture(checkpoint.config)
    planner = _Planner(config, checkpoint, architecture.config(checkpoint.config), cache_type)
    asked = min((n for n in (options.context_per_row, config.context) if n is not None), default=None)
    return planner.blueprint(asked, options.parallel, options.batch_tokens)


class _Planner:
    """The figures of one checkpoint on this device."""

    def __init__(
        self, process: RunnerConfig, checkpoint: Checkpoint, config: LanguageConfig, cache_type: CacheType
    ) -> None:
        self._process = process
        self._checkpoint = checkpoint
        self._plain = config
        self._config = config.with_cache(cache_type)
        self._cache_type = cache_type
        self._infos = tuple(checkpoint.infos())
        self._device = backend.device()
        self._available = available_bytes(self._device)

    def blueprint(self, asked: int | None, parallel: int, batch_tokens: int | None) -> TextBlueprint:
        """The plan under the policy that the process was told; `auto` is decided here."""
        policy = self._process.weights
        chunk = self._process.prefill_chunk or PREFILL_CHUNK[self._device.kind]
        chunk = min(chunk, batch_tokens or chunk)
        if policy != "auto":
            return self._under(policy, asked, parallel, chunk)
        if self._device.kind != "cpu":
            return self._under("keep", asked, parallel, chunk)
        widened = self._under("float32", asked, parallel, chunk)
        return widened if widened.memory.fits else self._under("keep", asked, parallel, chunk)

    def _under(self, policy: WeightPolicy, asked: int | None, parallel: int, chunk: int) -> TextBlueprint:
        layers = [0] * (self._config.num_layers + 1)
        embedding = 0
        for info in self._infos:
            size = held_nbytes(info, policy, self._device)
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
        return TextBlueprint(
            self._process, self._checkpoint, policy, context, parallel, chunk, self._cache_type, memory
        )

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
        step += 4 * parallel * (1 + self._process.draft) * self._config.vocab_size
        if self._cache_type != "f16":
            # Each layer's in turn is dequantised for its attention.
            step += max(self._plain.cache_nbytes_per_layer(keys, itemsize=self._itemsize)) // FLOAT32_BYTES
        largest = max((info.nbytes + held_nbytes(info, policy, self._device) for info in self._infos), default=0)
        return max(FLOAT32_BYTES * step, largest)


def _integer(config: Mapping[str, JSON], key: str, default: int) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else default
