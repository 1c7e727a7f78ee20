"""The executor on MLX: Metal and CUDA, and MLX's CPU backend for the tests.

A step is built lazily and set off; on a GPU the next one is built on tokens that nobody has read yet. What a row looks
at is reduced over its capacity class, a function of the row alone; matrix products round by the number of rows, so a
row's last bits depend on its company, and a token changes only where two candidates are that close.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from models.arch import Model
from models.errors import ExecutionError
from models.executors.base import Checkpoint, Logits, Segment, Step
from models.executors.mlx.activations import Activations
from models.executors.mlx.ops import StepOps
from models.executors.mlx.parts import Part, parts_of
from models.executors.mlx.rotations import Wavelengths
from models.executors.mlx.segments import (
    DeviceCheckpoint,
    DeviceSegment,
    checkpoint,
    copied,
    go_to,
    read,
    read_checkpoint,
    restored,
)
from models.executors.mlx.slabs import LONGEST_STEP, LayerSpec, RecurrentSpec, Slabs, StateSpec, class_capacity
from models.executors.mlx.weights import Weights
from models.executors.mlx.whole import TextOps
from models.executors.replay import MOST_REPLAYED, Replays
from models.mlx_memory import give_back
from models.sampling import Draw
from models.sampling.device import DeviceSampled, sample

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DeviceLogits:
    """Logits of a step's wanted places. Shapes: values float32 (N, V)."""

    values: mx.array

    def read(self) -> npt.NDArray[np.float32]:
        """See `Logits.read`."""
        with _running():
            mx.eval(self.values)
        return np.array(self.values)

    def last(self) -> "DeviceLogits":
        """See `Logits.last`."""
        return DeviceLogits(self.values[-1:])


@dataclass(slots=True)
class Last:
    """The tokens that were sampled last, and where each slot's is among them."""

    tokens: mx.array
    place: int


@dataclass(slots=True)
class MLXExecutor:
    """Implements `Executor` and `Encoder`. Thread: the executor's, but for what says otherwise."""

    model: Model
    weights: Weights
    specs: tuple[StateSpec, ...]
    depth: int
    wavelengths: Wavelengths = field(default_factory=Wavelengths)
    activations: Activations = field(default_factory=Activations)
    suppressed: tuple[int, ...] = ()
    """Tokens whose logits are -inf, whatever they are."""
    _slabs: Slabs = field(init=False)
    _last: dict[int, Last] = field(default_factory=dict)
    _replays: Replays[DeviceCheckpoint] = field(init=False)

    def __post_init__(self) -> None:
        self._slabs = Slabs(self.specs)
        self._replays = Replays(self._kept, self._go_to)

    @property
    def needs_checkpoints(self) -> bool:
        """See `Executor.needs_checkpoints`. Thread: any."""
        return any(isinstance(spec, RecurrentSpec) for spec in self.specs)

    @property
    def vocab_size(self) -> int:
        """See `Executor.vocab_size`. Thread: any."""
        return self.model.config.vocab_size

    def forward(self, step: Step) -> DeviceLogits | None:
        """See `Executor.forward`. Builds a graph; computes where depth is 0."""
        if not self.needs_checkpoints:
            return self._forward(step)
        logits = None
        for rows in self._replays.passes(step.rows):
            logits = self._forward(Step(rows))
        return logits

    def _forward(self, step: Step) -> DeviceLogits | None:
        """Run the rows, each from where its state stands."""
        with _running():
            logits = self.built(step)
            begun = [*([] if logits is None else [logits.values]), *self._slabs.arrays()]
            if not self.depth:
                mx.eval(begun)
            elif logits is None:
                mx.async_eval(begun)
        return logits

    def built(self, step: Step) -> DeviceLogits | None:
        """The step's graph, nothing computed."""
        parts = parts_of(step.rows, self._slabs)
        ops = StepOps(
            self.weights,
            self._tokens(parts),
            parts,
            self.specs,
            wavelengths=self.wavelengths,
            activations=self.activations,
        )
        hidden = self.model.forward(ops)
        if not step.wanted:
            return None
        places = _wanted(step, parts)
        if places != [*range(len(hidden))]:
            hidden = hidden[mx.array(places, dtype=mx.int32)]
        assert self.model.logits is not None, "an encoder says no words"
        values = self.model.logits(ops, hidden).astype(mx.float32)
        if self.suppressed:
            values[:, mx.array(self.suppressed)] = -mx.inf
        return DeviceLogits(values)

    def sample(self, logits: Logits, draws: Sequence[Draw]) -> DeviceSampled:
        """See `Executor.sample`."""
        assert isinstance(logits, DeviceLogits)
        unread = {draw.slot: self._last_token(draw.slot) for draw in draws if draw.unread and draw.counts is not None}
        tokens, sampled = sample(logits.values, draws, unread)
        self._last |= {draw.slot: Last(tokens, place) for place, draw in enumerate(draws)}
        with _running():
            mx.async_eval(sampled.arrays())
        return sampled

    def residuals(
        self, tokens: Sequence[int], layers: Sequence[int], *, visible: int | None = None
    ) -> npt.NDArray[np.float32]:
        """See `Encoder.residuals`."""
        ops = TextOps(self.weights, mx.array(list(tokens), dtype=mx.int32), self.wavelengths, visible)
        self.model.forward(ops)
        found = mx.stack([ops.residuals[layer].astype(mx.float32) for layer in layers])
        mx.eval(found)
        return np.array(found)

    def draft_room(self, begin: int) -> int:  # noqa: ARG002 - the same everywhere
        """See `Executor.draft_room`: a ring has room for the longest step behind its window. Thread: any."""
        room = max((spec.longest_step for spec in self.specs if isinstance(spec, LayerSpec)), default=LONGEST_STEP) - 1
        return room - MOST_REPLAYED if self.needs_checkpoints else room

    def state_nbytes(self, tokens: int) -> int:
        """See `Executor.state_nbytes`. Thread: any."""
        return sum(spec.nbytes(class_capacity(tokens)) for spec in self.specs) if tokens else 0

    def first_held(self, tokens: int) -> int:
        """See `Executor.first_held`. Thread: any."""
        return max((spec.first_held(tokens) for spec in self.specs if isinstance(spec, LayerSpec)), default=0)

    def segment(self, slot: int, tokens: int, begin: int, end: int) -> DeviceSegment:  # noqa: ARG002 - positions say it
        """See `Executor.segment`."""
        slab, place = self._slabs.find(slot)
        return copied(slab, place, self.specs, begin, end)

    def checkpoint(self, slot: int, tokens: int) -> DeviceCheckpoint | None:
        """See `Executor.checkpoint`."""
        return self._kept(slot) if self._replays.stands(slot) == tokens else None

    def restore(self, slot: int, segments: Sequence[Segment], checkpoint: Checkpoint | None = None) -> None:
        """See `Executor.restore`."""
        own = [segment for segment in segments if isinstance(segment, DeviceSegment)]
        assert len(own) == len(segments)
        tokens = sum(segment.length for segment in own)
        slab = self._slabs.place(slot, tokens)
        restored(slab, slab.rows.index(slot), self.specs, own)
        if self.needs_checkpoints:
            assert isinstance(checkpoint, DeviceCheckpoint)
            self._go_to(slot, checkpoint)
            self._replays.restored(slot, tokens)

    def read_segment(self, arrays: Mapping[str, Array], length: int) -> DeviceSegment:
        """See `Executor.read_segment`."""
        return read(arrays, self.specs, length)

    def read_checkpoint(self, arrays: Mapping[str, Array]) -> DeviceCheckpoint:
        """See `Executor.read_checkpoint`."""
        return read_checkpoint(arrays, self.specs)

    def release(self, slot: int) -> None:
        """See `Executor.release`."""
        self._last.pop(slot, None)
        self._slabs.release(slot)
        self._replays.forget(slot)

    def memory_bytes(self) -> int:
        """See `Executor.memory_bytes`."""
        return self.weights.nbytes + self._slabs.nbytes

    def give_back(self) -> None:
        """See `Executor.give_back`."""
        give_back()

    def close(self) -> None:
        """See `Executor.close`."""
        mx.synchronize()
        self._last.clear()
        self._slabs = Slabs(self.specs)
        self.weights = Weights()
        mx.clear_cache()

    def _kept(self, slot: int) -> DeviceCheckpoint:
        return checkpoint(*self._slabs.find(slot), self.specs)

    def _go_to(self, slot: int, kept: DeviceCheckpoint) -> None:
        go_to(*self._slabs.find(slot), self.specs, kept)

    def _tokens(self, parts: Sequence[Part]) -> mx.array:
        """The tokens of all parts, one behind the other. Shape: int32 (T,)."""
        rows = [row for part in parts for row in part.rows]
        known: list[int] = []
        pieces: list[mx.array] = []
        waiting: list[Last] = []

        def flush() -> None:
            if known:
                pieces.append(mx.array(known, dtype=mx.int32))
                known.clear()
            if waiting:
                pieces.append(_taken(waiting))
                waiting.clear()

        for row in rows:
            if bool(row.tokens) == bool(waiting) or (not row.tokens and known):
                flush()
            if row.tokens:
                known.extend(row.tokens)
            else:
                waiting.append(self._last[row.slot])
        flush()
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    def _last_token(self, slot: int) -> mx.array:
        last = self._last[slot]
        return last.tokens[last.place]


@contextmanager
def _running() -> Iterator[None]:
    """Say of MLX's errors that they are a step's. Raises ExecutionError."""
    try:
        yield
    except RuntimeError as error:
        raise ExecutionError(f"MLX could not run a step: {error}") from error


def _taken(waiting: Sequence[Last]) -> mx.array:
    """Unread tokens, most often all of one step. Shape: int32 (N,)."""
    first = waiting[0].tokens
    if all(each.tokens is first for each in waiting):
        places = [each.place for each in waiting]
        return first if places == [*range(len(first))] else first[mx.array(places, dtype=mx.int32)]
    return mx.stack([each.tokens[each.place] for each in waiting])


def _wanted(step: Step, parts: Sequence[Part]) -> list[int]:
    """The wanted places among the tokens of all parts, in the order of the step's rows."""
    starts: dict[int, int] = {}
    for part in parts:
        for index, row in enumerate(part.rows):
            starts[row.slot] = part.start + index * part.length
    places: list[int] = []
    for row in step.rows:
        end = starts[row.slot] + row.length
        places += range(end - row.wanted, end)
    return places
