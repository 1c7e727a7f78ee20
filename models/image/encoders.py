"""A pipeline's text encoder on an executor: ONNX Runtime on a CPU, MLX on a GPU."""

from typing import TYPE_CHECKING, Literal

from models.arch import Model
from models.checkpoint import Checkpoint
from models.device import device, usable_cores
from models.executors.base import Encoder
from models.executors.footprint import Footprint
from models.image.base import LoadChoices
from models.image.loading import ComponentView, dense_dtype, keeps_quantized_component
from models.image.lora import MergedCheckpoint
from models.ops import weights_in
from models.weights.matching import matched

if TYPE_CHECKING:
    from models.executors.onnx import OnnxOptions

LONGEST_TOKENS = 512
"""A longer prompt is cut there, template and all, as the reference pipelines do."""
_PADDING_TOKENS = 256


def load_encoder(
    view: ComponentView,
    model: Model,
    choices: LoadChoices,
    layers: tuple[int, ...],
    *,
    span: tuple[float, float],
    unused: tuple[str, ...],
) -> Encoder:
    """Load a text encoder, LoRAs merged. Thread: the executor's.

    Args:
        view: the component.
        model: its layers, as far as they are asked.
        choices: how weights are held, the LoRAs, who is told of the progress.
        layers: which residual streams are going to be asked for, by how many layers make them.
        span: which part of the whole load this is, 0 to 1.
        unused: beginnings of the names of tensors that nobody asks for.

    Raises:
        ModelError: the checkpoint cannot be used.
    """
    low, high = span
    weights = _weights(view, choices)

    def progress(done: float) -> None:
        choices.progress(low + (high - low) * done)

    checkpoint: Checkpoint = view
    if choices.loras:
        dtype = dense_dtype(view.component)
        pipeline = MergedCheckpoint(
            view.pipeline, view.component, choices.loras, dtype=dtype, requantize=weights == "keep"
        )
        checkpoint = ComponentView(pipeline, view.component, view.tokenizer, view.config)
    if device().kind == "cpu":
        from models.executors.onnx import OnnxEncoder, load  # noqa: PLC0415 - only what runs is imported

        taps = tuple(dict.fromkeys(layers))
        loaded = load(checkpoint, model, _options(weights, taps), progress=progress, unused=unused)
        return OnnxEncoder(loaded, taps)
    from models.executors.mlx import load as load_mlx  # noqa: PLC0415

    return load_mlx(
        checkpoint,
        model,
        policy=weights,
        cache_type="f16",
        longest_step=LONGEST_TOKENS,
        progress=progress,
        unused=unused,
    )


def predicted(
    view: ComponentView, model: Model, choices: LoadChoices, layers: tuple[int, ...], unused: tuple[str, ...]
) -> Footprint:
    """What a text encoder takes, from headers alone. Thread: any. Raises CheckpointError."""
    found = matched(weights_in(model.weights), view.infos(), view.reference, unused)
    weights = _weights(view, choices)
    if device().kind == "cpu":
        from models.executors.onnx import footprint  # noqa: PLC0415

        return footprint(model, found, _options(weights, layers))
    from models.executors.mlx import footprint as footprint_mlx  # noqa: PLC0415

    return footprint_mlx(model, found, policy=weights, cache_type="f16")


def _weights(view: ComponentView, choices: LoadChoices) -> Literal["keep", "float32"]:
    return "keep" if keeps_quantized_component(view.pipeline, view.component, choices.policy) else "float32"


def _options(weights: Literal["keep", "float32"], taps: tuple[int, ...]) -> "OnnxOptions":
    from models.executors.onnx import OnnxOptions  # noqa: PLC0415

    capacity = LONGEST_TOKENS + _PADDING_TOKENS
    return OnnxOptions(weights=weights, capacity=capacity, threads=usable_cores(), taps=tuple(dict.fromkeys(taps)))
