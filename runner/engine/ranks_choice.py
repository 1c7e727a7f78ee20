"""The executor that is several ranks, as a plan chooses it: what its largest rank takes, and the load of them all."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from models.arch import Model
from models.checkpoint import Checkpoint, TensorInfo
from models.device import Device
from models.executors.base import Embedder, Executor, PictureEncoder
from models.executors.footprint import Footprint
from models.executors.shared import SharedExecutor
from models.fingerprint import digests
from models.vision.base import Vision
from models.weights.matching import tensors_of
from models.weights.shares import plans_of
from runner.config import CacheType, RunnerConfig, WeightChoice
from runner.engine.executors import ChosenName, MLXChoice, Progress, Shape, choices
from runner.errors import LoadError
from runner.ranks.first import Ranks


@dataclass(frozen=True, slots=True)
class RanksChoice:
    """MLX on several ranks. Thread: any, but for `load`."""

    alone: MLXChoice
    """What it would be on one machine; a vision tower is the first rank's alone."""
    ranks: Ranks
    config: RunnerConfig
    reference: str
    name: ChosenName = "mlx"

    @property
    def weights(self) -> WeightChoice:
        """See `Choice.weights`."""
        return self.alone.weights

    @property
    def cache_type(self) -> CacheType:
        """How keys and values are held."""
        return self.alone.cache_type

    @property
    def form(self) -> str:
        """See `Choice.form`."""
        return f"{self.alone.form} {self.config.ranks.sharding} {self.ranks.count}"

    def footprint(self, model: Model, found: Mapping[str, TensorInfo], *, hidden: bool = False) -> Footprint:  # noqa: ARG002 - a head is a matter of the declarations
        """See `Choice.footprint`: that of the rank that takes most.

        Raises:
            ShareError: the model does not divide.
        """
        from models.executors.mlx.ranks import rank_footprint  # noqa: PLC0415 - imports MLX

        plans = plans_of(model, found, self.reference, self.ranks.count, self.config.ranks.sharding)
        footprints = [rank_footprint(model, plan, found, self._policy, self.cache_type) for plan in plans]
        return max(footprints, key=lambda each: each.weights)

    def load(self, checkpoint: Checkpoint, model: Model, shape: Shape, progress: Progress) -> Executor:
        """See `Choice.load`. Raises LoadError: a rank is lost, or has another model."""
        from models.executors.mlx.ranks import Options, load_rank  # noqa: PLC0415 - imports MLX

        def look(done: float) -> None:
            self.ranks.check()
            progress(done)

        group = self.ranks.group()
        options = Options(self._policy, self.cache_type, shape.longest_step, shape.context)
        self.ranks.load(
            {
                "model": self.reference,
                "store": str(self.config.store),
                "digests": dict(digests(checkpoint)),
                "sharding": self.config.ranks.sharding,
                "policy": options.policy,
                "cache_type": options.cache_type,
                "longest_step": options.longest_step,
                "reach": options.reach,
                "depth": options.depth,
                "other_parts": list(model.other_parts),
            }
        )
        plans = plans_of(
            model, tensors_of(model, checkpoint), self.reference, self.ranks.count, self.config.ranks.sharding
        )
        executor = load_rank(checkpoint, model, plans, group, options, progress=look)
        self.ranks.loaded()
        return SharedExecutor(executor, self.ranks)

    def load_embedder(
        self,
        checkpoint: Checkpoint,
        model: Model,  # noqa: ARG002 - there is none
        context: int,  # noqa: ARG002
        pass_tokens: int,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
    ) -> Embedder:
        """See `Choice.load_embedder`. Raises LoadError, always."""
        raise not_shared(checkpoint.reference)

    def tower_footprint(self, checkpoint: Checkpoint, vision: Vision) -> Footprint:
        """See `Choice.tower_footprint`."""
        return self.alone.tower_footprint(checkpoint, vision)

    def load_tower(self, checkpoint: Checkpoint, vision: Vision, progress: Progress) -> PictureEncoder:
        """See `Choice.load_tower`."""
        return self.alone.load_tower(checkpoint, vision, progress)

    @property
    def _policy(self) -> Literal["keep", "float32"]:
        return "float32" if self.weights == "float32" else "keep"


def ranks_choice(
    config: RunnerConfig, cache_type: CacheType, device: Device, ranks: Ranks, reference: str
) -> RanksChoice:
    """The one way in which ranks run a text model, once they are all there.

    Raises:
        LoadError: flags contradict each other, or a rank does not come.
    """
    if config.executor == "onnx":
        raise LoadError("--executor=onnx runs on one machine; leave it out, or --hostfile")
    (alone,) = choices(replace(config, executor="mlx"), cache_type, device)
    assert isinstance(alone, MLXChoice)
    ranks.connected()
    return RanksChoice(alone, ranks, config, reference)


def not_shared(reference: str) -> LoadError:
    """Why embeddings and pictures are not made by several machines."""
    return LoadError(f"{reference} is no model that says words, and only these are shared; leave --hostfile out")
