"""An embedding model's figures, and its engine.

Owns the memory prediction: weights as the executor holds them, and the arrays of the largest pass, whose scores grow
with the square of a text's length. Where nobody asked for a context, it is what the model allows and memory bears.
"""

import gc
import logging
from dataclasses import dataclass

from models.arch import Model
from models.checkpoint import Checkpoint
from models.device import device
from models.embedding import EmbeddingModel, EmbeddingSettings, embedding_config
from models.embedding.head import load_head
from models.tokenizer import load_tokenizer
from models.weights.matching import model_of, tensors_of
from runner.config import RunnerConfig
from runner.engine.blueprint import (
    FLOAT32_BYTES,
    GIB,
    DeviceMemory,
    LoadOptions,
    MemoryPlan,
    allocation_failures,
    held_fields,
)
from runner.engine.embedding import EmbeddingEngine
from runner.engine.executors import MLXChoice, OnnxChoice, choices
from runner.engine.loop import Progress
from runner.engine.memory_limits import available_bytes
from runner.engine.types import Engine
from runner.errors import LoadError

PASS_TOKENS = {"onnx": 256, "mlx": 4096}
"""On a CPU more makes nothing faster, and others wait longer."""
LEAST_CONTEXT = 128
ARENA = 4
"""Of a long text whose scores are not held ONNX Runtime's arena holds up to so many times the other arrays: it grows in
powers of two (measured at 8,000 tokens: 1.3 times for a width of 384, 3.7 times for 1,024)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddingBlueprint:
    """An embedding model's plan with the choices it rests on (see `blueprint.Blueprint`)."""

    checkpoint: Checkpoint
    settings: EmbeddingSettings
    model: Model
    choice: OnnxChoice | MLXChoice
    context: int
    memory: MemoryPlan

    def fields(self) -> dict[str, object]:
        """See `Blueprint.fields`."""
        return held_fields(self.checkpoint, self.choice, self.memory) | {
            "context": self.context,
            "pooling": self.settings.pooling,
            "normalize": self.settings.normalize,
        }

    def refusal(self) -> str:
        """See `Blueprint.refusal`."""
        memory = self.memory
        return (
            f"insufficient memory: {self.checkpoint.reference} needs {memory.total / GIB:.1f} GiB "
            f"(weights {memory.weights / GIB:.1f}, working space {memory.device.graph / GIB:.1f}) and "
            f"{memory.available / GIB:.1f} GiB are available; {self._remedy()}, or --check-memory=false to try all "
            "the same"
        )

    def build(self, progress: Progress) -> Engine:
        """See `Blueprint.build`."""
        tokenizer = load_tokenizer(self.checkpoint)
        pass_tokens = PASS_TOKENS[self.choice.name]
        with allocation_failures(self._remedy()):
            embedder = self.choice.load_embedder(self.checkpoint, self.model, self.context, pass_tokens, progress)
            head = load_head(self.checkpoint, self.settings)
        gc.collect()
        embedder.give_back()
        return EmbeddingEngine(
            EmbeddingModel(embedder, head),
            tokenizer,
            context_length=self.context,
            width=self.settings.width,
            widths=self.settings.widths,
            lower_case=self.settings.lower_case,
            pass_tokens=pass_tokens,
        )

    def _remedy(self) -> str:
        return "choose a smaller or quantised model, --weights=int8, or a smaller --context"


def plan_embedding(
    checkpoint: Checkpoint, settings: EmbeddingSettings, config: RunnerConfig, options: LoadOptions
) -> EmbeddingBlueprint:
    """Plan an embedding model's load: the first way of holding its weights that fits, or the last.

    Raises:
        ModelError: this package cannot run it.
        LoadError: flags contradict each other, or are for other models.
    """
    if config.loras:
        raise LoadError(
            f"{checkpoint.reference} is an embedding model, and --lora is for image pipelines; leave it out"
        )
    planner = _Planner(checkpoint, settings, config, options)
    plans = (planner.blueprint(choice) for choice in planner.choices)
    last: EmbeddingBlueprint | None = None
    for last in plans:
        if last.memory.fits:
            break
    assert last is not None
    return last


class _Planner:
    """The figures of one checkpoint on this device."""

    def __init__(
        self, checkpoint: Checkpoint, settings: EmbeddingSettings, config: RunnerConfig, options: LoadOptions
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._model = model = model_of(checkpoint, embedding_config(checkpoint.config))
        self._found = tensors_of(model, checkpoint)
        asked = (options.context_per_row, config.context)
        self._asked = min((tokens for tokens in asked if tokens is not None), default=None)
        self._device = device()
        self._available = available_bytes(self._device)
        self.choices = choices(config, "f16", self._device)

    def blueprint(self, choice: OnnxChoice | MLXChoice) -> EmbeddingBlueprint:
        """The plan of one way of holding the weights."""
        footprint = choice.footprint(self._model, self._found, hidden=True)
        fixed = footprint.weights + footprint.library
        longest = min(self._model.context_length, self._settings.max_tokens or self._model.context_length)
        context = longest if self._asked is None else min(self._asked, longest)
        pass_tokens, room, scored = PASS_TOKENS[choice.name], self._available - fixed, footprint.scored
        while self._asked is None and context > LEAST_CONTEXT and self._pass_nbytes(context, scored) > room:
            context = max(context // 2, LEAST_CONTEXT)
        largest = self._pass_nbytes(max(context, pass_tokens), scored)
        graph = max(largest, footprint.transient) + footprint.library
        cache = footprint.state(max(context, pass_tokens))
        weights = (*footprint.layers, footprint.output)
        held = DeviceMemory("0", self._device.kind, self._device.name, weights, cache, graph)
        memory = MemoryPlan(input_weights=footprint.embedding, device=held, available=self._available)
        return EmbeddingBlueprint(self._checkpoint, self._settings, self._model, choice, context, memory)

    def _pass_nbytes(self, tokens: int, scored: int | None) -> int:
        """The arrays of a pass of one text of so many tokens: hidden states, the MLP's, scores and their softmax.

        `scored`: see `Footprint`.
        """
        config = self._model.config
        values = tokens * (8 * config.hidden_size + 3 * config.intermediate_size)
        if scored is not None and tokens > scored:
            return FLOAT32_BYTES * (ARENA * values + 2 * config.num_heads * scored**2)
        return FLOAT32_BYTES * (values + 2 * config.num_heads * tokens**2)
