"""What a load would take and what there is: the part of loading that text models and image pipelines share.

A blueprint is made from headers alone, so a parent that asks "would it fit?" is answered without touching a weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from models.checkpoint import Checkpoint
from runner.config import CacheType
from runner.engine.loop import Progress
from runner.engine.types import Engine
from runner.errors import InsufficientMemory

FLOAT32_BYTES = 4
GIB = 2**30


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a parent asks of a load; None is the process's own choice."""

    parallel: int
    context_per_row: int | None
    batch_tokens: int | None
    cache_type: CacheType | None = None
    projector: Path | None = None
    """A file that has the vision tower of a GGUF model."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on the device: weights and cache by layer, and the graph.

    The last of a language model's weights is the output layer; a pipeline has a component where a model has a layer.
    """

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
        return self.weights + sum(self.device.cache) + self.device.graph

    @property
    def weights(self) -> int:
        """The weights alone."""
        return self.input_weights + sum(self.device.weights)

    @property
    def fits(self) -> bool:
        """It is predicted to fit."""
        return self.total <= self.available


def held_fields(checkpoint: Checkpoint, choice: "Held", memory: MemoryPlan) -> dict[str, object]:
    """How a model is held and what that takes, for the log."""
    return {
        "model": checkpoint.reference,
        "device": memory.device.name,
        "executor": choice.name,
        "weights_held": "as stored" if choice.weights == "keep" else choice.weights,
        "weights_mib": memory.weights >> 20,
        "graph_mib": memory.device.graph >> 20,
        "available_mib": memory.available >> 20,
    }


class Held(Protocol):
    """How an executor holds a model's weights."""

    @property
    def name(self) -> str:
        """The executor's."""
        ...

    @property
    def weights(self) -> str:
        """In which form."""
        ...


class Blueprint(Protocol):
    """A plan with the choices it rests on. Thread: any, but for `build`."""

    @property
    def memory(self) -> MemoryPlan:
        """What it would take."""
        ...

    def fields(self) -> dict[str, object]:
        """The figures, for the log."""
        ...

    def refusal(self) -> str:
        """Why it does not fit, with figures and remedies."""
        ...

    def build(self, progress: Progress) -> Engine:
        """Load the model. Thread: the executor's.

        Raises:
            ModelError: the checkpoint cannot be used.
            InsufficientMemory: there was less memory than the figures said.
        """
        ...


@contextmanager
def allocation_failures(remedy: str) -> Iterator[None]:
    """Say what an allocation that fails in here means.

    Raises:
        InsufficientMemory: one did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise InsufficientMemory(f"insufficient memory while loading ({error}); {remedy}") from error
        raise
