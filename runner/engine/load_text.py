"""A text model's figures, and its engine.

Owns the memory prediction and the choice of how weights and cache are held; knows no tensor and no wire.

The prediction has three parts. *Weights*: what the executor's footprints say, from declarations and headers. *Cache*:
the whole context of all rows if somebody asked for a context; otherwise PLANNED_TOKENS in all, for state grows on
demand and a model that allows 131,072 tokens hardly ever gets them. *Graph*: the arrays of one step, or what loading
holds besides. Without an asked context a row may hold as much as the model allows and as fits into what is left.
"""

import gc
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeAlias

from models.arch import Model
from models.checkpoint import Checkpoint
from models.device import device
from models.executors.base import Executor
from models.fingerprint import fingerprint
from models.grammar import GrammarCompiler
from models.weights.matching import left_out, model_of, tensors_of
from runner.config import CacheType, RunnerConfig
from runner.engine.admission import Admission
from runner.engine.blueprint import (
    FLOAT32_BYTES,
    GIB,
    DeviceMemory,
    LoadOptions,
    MemoryPlan,
    allocation_failures,
    held_fields,
)
from runner.engine.disk_cache import FORMAT, DiskCache
from runner.engine.executors import MLXChoice, OnnxChoice, Shape, choices
from runner.engine.load_vision import VisionPlan, Words, load_eye, plan_vision, vision_of
from runner.engine.loop import Progress
from runner.engine.memory_limits import available_bytes
from runner.engine.prefix_cache import PrefixCache
from runner.engine.ranks_choice import RanksChoice, ranks_choice
from runner.engine.text import TextEngine
from runner.engine.types import Engine
from runner.errors import LoadError
from runner.ranks.first import Ranks

Way: TypeAlias = OnnxChoice | MLXChoice | RanksChoice

PLANNED_TOKENS = 8192
PREFILL_CHUNK = {"onnx": 64, "mlx": 512}
"""On a CPU more hardly makes a prompt faster, and less lets others speak sooner."""
PREFIX_CACHE_SHARE = 4
LEAST_CONTEXT = 2048
CONTEXT_STEP = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextBlueprint:
    """A text model's plan with the choices it rests on (see `blueprint.Blueprint`)."""

    config: RunnerConfig
    checkpoint: Checkpoint
    model: Model
    choice: Way
    shape: Shape
    chunk: int
    memory: MemoryPlan
    words: Words
    sight: VisionPlan
    ranks: Ranks | None = None

    def fields(self) -> dict[str, object]:
        """See `Blueprint.fields`."""
        return held_fields(self.checkpoint, self.choice, self.memory) | {
            "cache_type": self.choice.cache_type,
            "cache_mib": sum(self.memory.device.cache) >> 20,
            "context": self.shape.context,
            "parallel": self.shape.rows,
            **({} if self.sight.vision is None else {"vision_mib": self.sight.weights >> 20}),
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
        # First, so that what reading a vocabulary leaves behind is room for weights.
        tokenizer = self.words.tokenizer
        grammars = GrammarCompiler(tokenizer, self.model.config.vocab_size, strict=self.config.strict_format)
        with allocation_failures(self._remedy()), ExitStack() as undo:
            share = 1 - self.sight.weights / max(self.memory.weights, 1)
            executor = self.choice.load(self.checkpoint, self.model, self.shape, lambda part: progress(part * share))
            undo.callback(executor.close)
            eye = load_eye(
                self.checkpoint,
                self.sight.vision,
                self.choice,
                limit=self.config.image_cache_bytes,
                spare=self.memory.available - self.memory.total,
                progress=lambda part: progress(share + part * (1 - share)),
            )
            undo.pop_all()
        gc.collect()
        executor.give_back()
        logger.debug("weights loaded", extra={"fields": {"form": self.choice.form, "prefill_chunk": self.chunk}})
        return TextEngine(
            executor,
            tokenizer,
            context_length=self.shape.context,
            parallel=self.shape.rows,
            prefill_chunk=self.chunk,
            prefix_cache=self._prefix_cache(executor),
            admission=self._admission(executor) if self.config.check_memory else None,
            draft=self.config.draft,
            grammars=grammars,
            eye=eye,
        )

    def _admission(self, executor: Executor) -> Admission:
        return Admission(
            executor.state_nbytes,
            lambda: _free(self.ranks),
            working_bytes=self.memory.device.graph,
            give_back=executor.give_back,
        )

    def _prefix_cache(self, executor: Executor) -> PrefixCache | None:
        limit = self.config.cache_bytes
        if limit is None:
            limit = max(0, self.memory.available - self.memory.total) // PREFIX_CACHE_SHARE
        logger.info("prefix cache", extra={"fields": {"limit_mib": limit >> 20}})
        return PrefixCache(executor, limit, self._disk_cache()) if limit else None

    def _disk_cache(self) -> DiskCache | None:
        """The files of this model in this form; None if nobody asked for them, or they cannot be kept."""
        if self.config.cache_dir is None:
            return None
        if self.ranks is not None:
            logger.warning("the prefix cache of several ranks is not kept on disk")
            return None
        model = fingerprint(self.checkpoint, FORMAT, self.choice.form, str(self.shape.drafts))
        try:
            disk = DiskCache(self.config.cache_dir, model[:32], limit_bytes=self.config.cache_dir_bytes)
        except OSError as error:
            # Whoever waits for an answer does not care.
            logger.warning("the prefix cache is not kept on disk", extra={"fields": {"reason": str(error)}})
            return None
        logger.info("prefix cache on disk", extra={"fields": {"folder": str(self.config.cache_dir / model[:32])}})
        return disk

    def _remedy(self) -> str:
        keep = "--weights=keep, " if self.choice.weights == "float32" else ""
        cache = "--kv-cache-type=q8_0, " if self.choice.cache_type == "f16" else ""
        return f"choose a smaller or quantised model, {keep}{cache}a smaller --context or --parallel"


def plan_text(
    checkpoint: Checkpoint, config: RunnerConfig, options: LoadOptions, ranks: Ranks | None = None
) -> TextBlueprint:
    """Plan a text model's load: the first way of holding its weights that fits, or the last.

    Raises:
        ModelError: this package cannot run it.
        LoadError: it was asked to be loaded as only pipelines can be, flags contradict each other, or a rank is lost.
    """
    if config.loras:
        raise LoadError(f"{checkpoint.reference} is a text model, and --lora is for image pipelines; leave it out")
    planner = _Planner(config, checkpoint, options, ranks)
    plans = (planner.blueprint(choice) for choice in planner.choices)
    last: TextBlueprint | None = None
    for last in plans:
        if last.memory.fits:
            break
    assert last is not None
    return last


class _Planner:
    """The figures of one checkpoint on this device."""

    def __init__(
        self, process: RunnerConfig, checkpoint: Checkpoint, options: LoadOptions, ranks: Ranks | None
    ) -> None:
        self._process = process
        self._checkpoint = checkpoint
        self._options = options
        model = model_of(checkpoint)
        self._words = Words(checkpoint)
        self._vision = vision_of(checkpoint, self._words)
        seen = () if self._vision is None else self._vision.tower.prefixes
        self._model = replace(model, other_parts=(*model.other_parts, *seen))
        self._found = tensors_of(self._model, checkpoint)
        for part, count in left_out(self._model, checkpoint).items():
            if part.startswith(seen):
                continue
            logger.info("tensors left out", extra={"fields": {"names": f"{part}*", "count": count}})
        self._device = device()
        self._ranks = ranks
        cache_type: CacheType = options.cache_type or process.kv_cache_type
        self.choices: list[Way] = [*choices(process, cache_type, self._device)]
        if ranks is not None:
            self.choices = [ranks_choice(process, cache_type, self._device, ranks, checkpoint.reference)]
        self._available = _free(ranks)

    def blueprint(self, choice: Way) -> TextBlueprint:
        """The plan of one way of holding the weights."""
        footprint = choice.footprint(self._model, self._found)
        parallel, asked = self._options.parallel, self._asked
        chunk = self._process.prefill_chunk or PREFILL_CHUNK[choice.name]
        chunk = min(chunk, self._options.batch_tokens or chunk)
        # A picture that looks both ways is run in one step.
        longest_run = 0 if self._vision is None else self._vision.longest_run or 0
        longest = max(chunk, 1 + self._process.draft, longest_run)
        sight = plan_vision(self._checkpoint, self._vision, choice)
        graph = max(self._step_nbytes(longest, parallel), footprint.transient, sight.loading)
        graph += footprint.library + sight.library
        context = self._context(asked, footprint.state, self._available - footprint.weights - sight.weights - graph)
        tokens = context if asked is not None else max(1, min(context, PLANNED_TOKENS) // parallel)
        cache = tuple(parallel * nbytes for nbytes in footprint.state(tokens))
        # As in Ollama's own table a tower is the output's.
        weights = (*footprint.layers, footprint.output + sight.weights)
        held = DeviceMemory("0", self._device.kind, self._device.name, weights, cache, graph)
        memory = MemoryPlan(input_weights=footprint.embedding, device=held, available=self._available)
        return TextBlueprint(
            self._process,
            self._checkpoint,
            self._model,
            choice,
            Shape(parallel, context, longest, self._process.draft > 0, self._vision is not None),
            chunk,
            memory,
            self._words,
            sight,
            self._ranks,
        )

    @property
    def _asked(self) -> int | None:
        return min((n for n in (self._options.context_per_row, self._process.context) if n is not None), default=None)

    def _context(self, asked: int | None, state: Callable[[int], tuple[int, ...]], room: int) -> int:
        """Tokens one row may hold: what was asked or, bounded by the room, the model's limit."""
        limit = self._model.context_length
        if asked is not None:
            return min(asked, limit)
        per_token = max(1, sum(state(CONTEXT_STEP)) // CONTEXT_STEP)
        fitting = room // per_token // CONTEXT_STEP * CONTEXT_STEP
        return min(limit, max(fitting, LEAST_CONTEXT))

    def _step_nbytes(self, chunk: int, parallel: int) -> int:
        """The arrays of one step of a full batch in prefill.

        The factors are counts of the arrays alive together: hidden states, the MLP's three, the scores and their
        softmax for PLANNED_TOKENS keys, the logits with what sampling makes of them.
        """
        config = self._model.config
        step = chunk * (8 * config.hidden_size + 3 * config.intermediate_size)
        step += 2 * chunk * min(self._model.context_length, PLANNED_TOKENS) * config.num_heads
        step += 4 * parallel * (1 + self._process.draft) * config.vocab_size
        return FLOAT32_BYTES * step


def _free(ranks: Ranks | None) -> int:
    """What may still be taken here, or by the rank that may take least."""
    own = available_bytes(device())
    return own if ranks is None else ranks.free_bytes(own)
