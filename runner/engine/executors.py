"""The choice of a text model's executor, and of how it holds the weights: what a plan needs, and the load itself.

Imports an executor's package when it is chosen, so that a process on the CPU never imports MLX, nor one on a GPU ONNX
Runtime.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from models.arch import Model
from models.checkpoint import Checkpoint, TensorInfo
from models.device import Device, DeviceKind, usable_cores
from models.executors.base import Embedder, Executor, PictureEncoder
from models.executors.footprint import Footprint
from models.vision.base import Vision
from models.weights.matching import tower_tensors_of
from runner.config import CacheType, ExecutorName, RunnerConfig, WeightChoice
from runner.errors import LoadError

if TYPE_CHECKING:
    from models.executors.onnx import OnnxOptions

Progress: TypeAlias = Callable[[float], None]
ChosenName: TypeAlias = Literal["onnx", "mlx"]

MOST_TEXTS = 64
"""Texts of one pass of a decoder, each of which has a slot."""
PADDED_TOKENS = 256
"""Places behind a text's last token that bounds of lengths are rounded up to."""
PADDING_TOKENS = 2
"""Places of a slot behind a row's last: a single token is run twice, at its place and behind it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many rows of how many tokens there may be, and the longest step."""

    rows: int
    context: int
    longest_step: int
    """A run of a picture's places that look at each other both ways is in one."""
    drafts: bool = False
    sees: bool = False
    """Rows may hold pictures."""


class Choice(Protocol):
    """An executor with a way of holding weights. Thread: any, but for `load`."""

    @property
    def name(self) -> ChosenName:
        """The executor's."""
        ...

    @property
    def weights(self) -> WeightChoice:
        """In which form it holds them."""
        ...

    @property
    def form(self) -> str:
        """What tells its numbers from those of another choice, for files that outlast the process."""
        ...

    def footprint(self, model: Model, found: Mapping[str, TensorInfo], *, hidden: bool = False) -> Footprint:
        """What the model will take, or only what its hidden states need. Raises QuantizationError."""
        ...

    def load(self, checkpoint: Checkpoint, model: Model, shape: Shape, progress: Progress) -> Executor:
        """Load it. Thread: the executor's. Raises ModelError."""
        ...

    def load_embedder(
        self, checkpoint: Checkpoint, model: Model, context: int, pass_tokens: int, progress: Progress
    ) -> Embedder:
        """Load what its hidden states need, for texts of up to `context` tokens and passes of up to `pass_tokens`.

        Thread: the executor's. Raises ModelError.
        """
        ...

    def tower_footprint(self, checkpoint: Checkpoint, vision: Vision) -> Footprint:
        """What the tower will take besides `Tower.working_bytes`. Raises CheckpointError as loading it does."""
        ...

    def load_tower(self, checkpoint: Checkpoint, vision: Vision, progress: Progress) -> PictureEncoder:
        """Load the tower. Thread: the executor's. Raises ModelError."""
        ...


@dataclass(frozen=True, slots=True)
class OnnxChoice:
    """ONNX Runtime on the CPU."""

    weights: WeightChoice
    activations: Literal["int8", "float32"]
    cache_type: CacheType
    threads: int
    name: ChosenName = "onnx"

    @property
    def form(self) -> str:
        """See `Choice.form`."""
        return f"onnx {self.weights} {self.activations} {self.cache_type}"

    def footprint(self, model: Model, found: Mapping[str, TensorInfo], *, hidden: bool = False) -> Footprint:
        """See `Choice.footprint`."""
        from models.executors.onnx import footprint  # noqa: PLC0415 - see above

        return footprint(model, found, replace(self._options(Shape(1, 1, 1)), hidden=hidden))

    def load(self, checkpoint: Checkpoint, model: Model, shape: Shape, progress: Progress) -> Executor:
        """See `Choice.load`."""
        from models.executors.onnx import OnnxExecutor, load  # noqa: PLC0415 - see above

        loaded = load(checkpoint, model, self._options(shape), progress=progress)
        return OnnxExecutor(loaded, model.config.vocab_size)

    def load_embedder(
        self, checkpoint: Checkpoint, model: Model, context: int, pass_tokens: int, progress: Progress
    ) -> Embedder:
        """See `Choice.load_embedder`."""
        from models.executors.onnx import load_embedder  # noqa: PLC0415 - see above

        rows = 1 if model.is_encoder else min(MOST_TEXTS, pass_tokens)
        options = self._options(Shape(rows, context, PADDED_TOKENS))
        return load_embedder(checkpoint, model, options, progress=progress)

    def tower_footprint(self, checkpoint: Checkpoint, vision: Vision) -> Footprint:
        """See `Choice.tower_footprint`."""
        from models.executors.onnx import tower_footprint  # noqa: PLC0415 - see above

        assert self.weights != "auto"
        return tower_footprint(vision.tower, tower_tensors_of(vision.tower, checkpoint), weights=self.weights)

    def load_tower(self, checkpoint: Checkpoint, vision: Vision, progress: Progress) -> PictureEncoder:
        """See `Choice.load_tower`."""
        from models.executors.onnx import load_tower  # noqa: PLC0415 - see above

        assert self.weights != "auto"
        return load_tower(checkpoint, vision.tower, weights=self.weights, threads=self.threads, progress=progress)

    def _options(self, shape: Shape) -> "OnnxOptions":
        from models.executors.onnx import OnnxOptions  # noqa: PLC0415 - see above

        assert self.weights != "auto"
        return OnnxOptions(
            weights=self.weights,
            activations=self.activations,
            cache_type=self.cache_type,
            slots=shape.rows,
            capacity=shape.context + shape.longest_step + PADDING_TOKENS,
            reach=shape.context,
            threads=self.threads,
            drafts=shape.drafts,
            pictures=shape.longest_step if shape.sees else 0,
        )


@dataclass(frozen=True, slots=True)
class MLXChoice:
    """MLX: Metal, CUDA, or its CPU backend for the tests."""

    weights: WeightChoice
    cache_type: CacheType
    device: DeviceKind
    name: ChosenName = "mlx"

    @property
    def form(self) -> str:
        """See `Choice.form`."""
        return f"mlx {self.device} {self.weights} {self.cache_type}"

    def footprint(self, model: Model, found: Mapping[str, TensorInfo], *, hidden: bool = False) -> Footprint:  # noqa: ARG002 - a head is a matter of the declarations
        """See `Choice.footprint`."""
        from models.executors.mlx import footprint  # noqa: PLC0415 - see above

        return footprint(model, found, policy=self._policy, cache_type=self.cache_type)

    def load(self, checkpoint: Checkpoint, model: Model, shape: Shape, progress: Progress) -> Executor:
        """See `Choice.load`."""
        from models.executors.mlx import load  # noqa: PLC0415 - see above

        return load(
            checkpoint,
            model,
            policy=self._policy,
            cache_type=self.cache_type,
            longest_step=shape.longest_step,
            reach=shape.context,
            progress=progress,
        )

    def load_embedder(
        self,
        checkpoint: Checkpoint,
        model: Model,
        context: int,  # noqa: ARG002 - arrays are made as they are needed
        pass_tokens: int,  # noqa: ARG002
        progress: Progress,
    ) -> Embedder:
        """See `Choice.load_embedder`."""
        from models.executors.mlx import load_embedder  # noqa: PLC0415 - see above

        return load_embedder(checkpoint, model, policy=self._policy, progress=progress)

    def tower_footprint(self, checkpoint: Checkpoint, vision: Vision) -> Footprint:
        """See `Choice.tower_footprint`."""
        from models.executors.mlx import tower_footprint  # noqa: PLC0415 - see above

        found = tower_tensors_of(vision.tower, checkpoint)
        return tower_footprint(vision.tower, found, policy=self._policy, config=checkpoint.config)

    def load_tower(self, checkpoint: Checkpoint, vision: Vision, progress: Progress) -> PictureEncoder:
        """See `Choice.load_tower`."""
        from models.executors.mlx import load_tower  # noqa: PLC0415 - see above

        return load_tower(checkpoint, vision.tower, policy=self._policy, progress=progress)

    @property
    def _policy(self) -> Literal["keep", "float32"]:
        return "float32" if self.weights == "float32" else "keep"


def choices(config: RunnerConfig, cache_type: CacheType, device: Device) -> list[OnnxChoice | MLXChoice]:
    """The ways in which this process may run a text model, the preferred one first.

    Raises:
        LoadError: flags contradict each other.
    """
    if _executor(config.executor, device) == "mlx":
        for flag, value, none in (
            ("weights", config.weights, ("int8", "int4")),
            ("activations", config.activations, ("int8",)),
        ):
            if value in none:
                raise LoadError(
                    f"--{flag}={value} is for the onnx executor, on a CPU; leave it out, or make a quantised model "
                    "with `ollama-mlx-runner create --quantize`"
                )
        return [MLXChoice("keep" if config.weights == "auto" else config.weights, cache_type, device.kind)]
    threads = config.threads or usable_cores()

    def choice(weights: WeightChoice) -> OnnxChoice:
        activations: Literal["int8", "float32"] = "float32" if config.activations == "float32" else "int8"
        return OnnxChoice(weights, activations, cache_type, threads)

    if config.weights != "auto":
        return [choice(config.weights)]
    # Without rounding the inputs the kernels are fast for float32 weights alone.
    return [choice("float32"), choice("keep")] if config.activations == "float32" else [choice("keep")]


def _executor(asked: ExecutorName, device: Device) -> ChosenName:
    if asked == "auto":
        return "onnx" if device.kind == "cpu" else "mlx"
    return asked
