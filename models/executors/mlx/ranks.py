"""One rank's executor on MLX: its own part of the weights and of the state, its own instructions.

What it is told is what an executor alone is told, and all ranks are told the same in the same order. Draws are the
first rank's alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import mlx.core as mx

from models.arch import Model
from models.checkpoint import Checkpoint
from models.executors.base import Logits
from models.executors.footprint import Footprint
from models.executors.mlx.activations import Activations
from models.executors.mlx.communication import MLXCommunication
from models.executors.mlx.executor import DeviceLogits, Last, MLXExecutor
from models.executors.mlx.kinds import CacheType
from models.executors.mlx.loading import compute_dtype, footprint
from models.executors.mlx.rotations import Wavelengths
from models.executors.mlx.slabs import LayerSpec, StateSpec, class_capacity, layer_specs
from models.executors.mlx.weights import Policy, Weights
from models.executors.replay import MOST_REPLAYED
from models.mlx_memory import configure
from models.ops import Ops, Recurrent, Weight, weights_in
from models.sampling import Draw
from models.sampling.device import DeviceSampled
from models.sharding.cuts import TensorCut, key_of
from models.sharding.program import RankPlan
from models.sources.base import TensorInfo
from models.suppressed import suppressed_tokens
from models.weights.matching import tensors_of
from models.weights.parts import taken
from models.weights.stacks import separate_tensors

Arrays = Ops[mx.array]


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is held; the same on all ranks."""

    policy: Policy
    cache_type: CacheType
    longest_step: int
    reach: int
    """Tokens that a row may have."""
    depth: int | None = None
    """See `load` of this package."""


@dataclass(slots=True)
class RankExecutor(MLXExecutor):
    """Implements `Executor` for one rank; figures that ranks differ in are those of the rank that has least room."""

    communication: MLXCommunication | None = None
    everyone: tuple[tuple[StateSpec, ...], ...] = ()
    """How each rank holds its layers' states."""
    is_recurrent: bool = False
    """Some rank has a recurrent layer: then all run the same passes."""

    @property
    def needs_checkpoints(self) -> bool:
        """See `Executor.needs_checkpoints`. Thread: any."""
        return self.is_recurrent

    @property
    def talk(self) -> MLXCommunication:
        """What it says to the other ranks."""
        assert self.communication is not None
        return self.communication

    def sample(self, logits: Logits, draws: Sequence[Draw]) -> DeviceSampled:
        """See `Executor.sample`: the first rank draws, and tells the others if the next step is begun on it unread."""
        sampled = MLXExecutor.sample(self, logits, draws)
        if self.depth:
            self._hear(self._last[draws[0].slot].tokens, [draw.slot for draw in draws])
        return sampled

    def hear(self, logits: Logits, slots: Sequence[int]) -> None:
        """What `sample` is on the other ranks, one slot for each wanted place."""
        assert isinstance(logits, DeviceLogits)
        # Behind the logits, which all ranks make together.
        if (before := self._last.get(slots[0])) is not None:
            # No further ahead than the rank that draws.
            mx.eval(before.tokens)
        (nothing,) = mx.depends([mx.zeros(len(slots), mx.int32)], [logits.values])
        self._hear(nothing, slots)

    def _hear(self, tokens: mx.array, slots: Sequence[int]) -> None:
        told = self.talk.tell(tokens)
        self._last |= {slot: Last(told, place) for place, slot in enumerate(slots)}
        mx.async_eval(told)

    def draft_room(self, begin: int) -> int:  # noqa: ARG002 - the same everywhere
        """See `Executor.draft_room`. Thread: any."""
        rings = [spec.longest_step for specs in self.everyone for spec in specs if isinstance(spec, LayerSpec)]
        room = min(rings) - 1
        return room - MOST_REPLAYED if self.is_recurrent else room

    def state_nbytes(self, tokens: int) -> int:
        """See `Executor.state_nbytes`: of the rank that takes most. Thread: any."""
        if not tokens:
            return 0
        return max(sum(spec.nbytes(class_capacity(tokens)) for spec in specs) for specs in self.everyone)

    def first_held(self, tokens: int) -> int:
        """See `Executor.first_held`: by every rank. Thread: any."""
        rings = [spec for specs in self.everyone for spec in specs if isinstance(spec, LayerSpec)]
        return max((spec.first_held(tokens) for spec in rings), default=0)


def load_rank(
    checkpoint: Checkpoint,
    model: Model,
    plans: Sequence[RankPlan],
    group: mx.distributed.Group,
    options: Options,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> RankExecutor:
    """Load this rank's part of a model. Thread: the executor's.

    Args:
        checkpoint: where the weights are.
        model: what they are declared by.
        plans: of every rank.
        group: all ranks.
        options: how it is held.
        progress: told 0 to 1 as weights arrive; may raise to abandon the load.

    Raises:
        CheckpointError: a tensor is missing, left over, misshaped or unreadable.
        QuantizationError: weights or cache cannot be held so.
    """
    configure()
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    rank = group.rank()
    plan = plans[rank]
    dtype = compute_dtype(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    everyone = tuple(layer_specs(each.state, options.cache_type, dtype, options.longest_step) for each in plans)
    communication = MLXCommunication(group, dtype)
    weights = _load_weights(checkpoint, model, plan, (options.policy, dtype), progress)
    return RankExecutor(
        _ranked(model, plan, communication),
        weights,
        everyone[rank],
        int(on_gpu) if options.depth is None else options.depth,
        Wavelengths(options.reach),
        Activations(compiled=on_gpu),
        suppressed_tokens(checkpoint, model.config.vocab_size) if rank == 0 else (),
        communication=communication,
        everyone=everyone,
        is_recurrent=any(isinstance(state, Recurrent) for state in model.state),
    )


def rank_footprint(
    model: Model, plan: RankPlan, found: Mapping[str, TensorInfo], policy: Policy, cache_type: CacheType
) -> Footprint:
    """What one rank's part will take, by the one predictor. Thread: any. Raises QuantizationError."""
    local: dict[str, TensorInfo] = {}
    for weight, _ in _held(model, plan):
        for name, shape in weight.tensors():
            info = found[name]
            nbytes = info.nbytes * prod(shape) // max(prod(info.shape), 1)
            local[name] = replace(info, shape=shape, nbytes=nbytes)
    weights = tuple(weight for weight, _ in _held(model, plan))
    return footprint(replace(model, weights=weights, state=plan.state), local, policy=policy, cache_type=cache_type)


def _held(model: Model, plan: RankPlan) -> list[tuple[Weight, Mapping[str, TensorCut]]]:
    """What a rank holds: its own declarations, and of which of their tensors it takes a part."""
    held: list[tuple[Weight, Mapping[str, TensorCut]]] = []
    for weight in weights_in(model.weights):
        key = key_of(weight)
        if key not in plan.shares:
            held.append((weight, {}))
        elif (share := plan.shares[key]) is not None:
            held.append((share.local, share.tensors))
    return held


def _load_weights(
    checkpoint: Checkpoint,
    model: Model,
    plan: RankPlan,
    held_as: tuple[Policy, mx.Dtype],
    progress: Callable[[float], None],
) -> Weights:
    found = tensors_of(model, checkpoint)
    tensors = {tensor.name: tensor for tensor in separate_tensors(checkpoint.tensors(), model.stacks)}
    weights, held = Weights(), _held(model, plan)
    total, done = sum(prod(shape) for weight, _ in held for _, shape in weight.tensors()) or 1, 0
    for weight, cuts in held:
        own = {name: taken(tensors[found[name].name], cuts.get(name)) for name, _ in weight.tensors()}
        weights.add(weight, own, *held_as)
        done += sum(prod(shape) for _, shape in weight.tensors())
        mx.clear_cache()
        progress(min(done / total, 1.0))
    return weights


def _ranked(model: Model, plan: RankPlan, communication: MLXCommunication) -> Model:
    """The model as one rank runs it."""

    def forward(ops: Ops[Any]) -> mx.array:
        communication.begin()
        hidden: mx.array = plan.forward.run(ops, communication)
        return hidden

    def logits(ops: Ops[Any], hidden: mx.array) -> mx.array:
        scores: mx.array = plan.logits.run(ops, communication, hidden)
        return scores

    return replace(model, state=plan.state, forward=forward, logits=logits)
