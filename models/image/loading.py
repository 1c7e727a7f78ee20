"""The components of a pipeline: their configurations, their weights, and one of them as a checkpoint of its own.

Owns what pipelines' files have in common, whichever source they come from: names of text encoders with and without
`model.`, and in what type a component is held. Knows no architecture: names and shapes are the matter of
`models.image.weights`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
from mlx import nn

from models.checkpoint import JSON, Checkpoint, NamedTensor, TensorInfo
from models.config_reader import ConfigReader
from models.device import device
from models.errors import CheckpointError
from models.image.base import LoadChoices
from models.image.lora import MergedCheckpoint
from models.image.weights import WeightReport, is_unused, load_weights, planned_nbytes
from models.quantization import WeightPolicy, keeps_quantized
from models.sources.hf import parse_config

# Components whose arithmetic needs float32 wherever it runs.
FLOAT32_COMPONENTS = frozenset({"vae"})


def component_config(checkpoint: Checkpoint, component: str, file: str = "config.json") -> ConfigReader:
    """A configuration file of one component (`scheduler`, `scheduler_config.json`). Thread: any.

    Raises:
        CheckpointError: the pipeline has no such file, or it is no JSON object.
    """
    return ConfigReader(_parsed(checkpoint, component, file), f"{component}/{file}")


def _parsed(checkpoint: Checkpoint, component: str, file: str) -> dict[str, JSON]:
    text = checkpoint.read(f"{component}/{file}")
    if text is None:
        raise CheckpointError(f"the pipeline has no {component}/{file}", file=checkpoint.reference)
    return parse_config(text, f"{checkpoint.reference}/{component}/{file}")


@dataclass(frozen=True, slots=True)
class ComponentView:
    """One component of a pipeline as a checkpoint of its own (see `Checkpoint`); `component_view` makes it."""

    pipeline: Checkpoint
    component: str
    tokenizer: str
    config: Mapping[str, JSON]

    @property
    def reference(self) -> str:
        """What messages call it."""
        return f"{self.pipeline.reference}/{self.component}"

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors as stored."""
        return sum(info.nbytes for info in self.infos())

    def read(self, name: str) -> bytes | None:
        """A file of the component's folder, or of its tokenizer's."""
        own = self.pipeline.read(f"{self.component}/{name}")
        if own is not None or not self.tokenizer:
            return own
        return self.pipeline.read(f"{self.tokenizer}/{name}")

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        """See `Checkpoint.infos`."""
        assert not component, "a component has no components"
        return self.pipeline.infos(self.component)

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """See `Checkpoint.tensors`."""
        assert not component, "a component has no components"
        return self.pipeline.tensors(self.component)


def component_view(checkpoint: Checkpoint, component: str, tokenizer: str = "") -> ComponentView:
    """One component as a checkpoint, so that executors and `models.tokenizer` can be used on it. Thread: any.

    Args:
        checkpoint: the pipeline.
        component: its folder.
        tokenizer: the folder that is asked for files which the component's own has not.

    Raises:
        CheckpointError: the component has no config.json, or it is no JSON object.
    """
    return ComponentView(checkpoint, component, tokenizer, _parsed(checkpoint, component, "config.json"))


def component_spans(checkpoint: Checkpoint, components: Sequence[str]) -> list[tuple[float, float]]:
    """Each component's part of a whole load, 0 to 1, by its bytes. Thread: any. Raises CheckpointError."""
    sizes = [sum(info.nbytes for info in checkpoint.infos(component)) for component in components]
    ends = [end / max(sum(sizes), 1) for end in accumulate(sizes)]
    return list(zip([0.0, *ends], ends, strict=False))


def dense_dtype(component: str) -> mx.Dtype | None:
    """What a component's dense tensors are cast to on this device; None keeps them as stored. Thread: any."""
    return mx.float32 if device().kind == "cpu" or component in FLOAT32_COMPONENTS else None


def component_nbytes(
    checkpoint: Checkpoint, component: str, policy: WeightPolicy, *, unused: tuple[str, ...] = ()
) -> int:
    """The bytes that a component will take once `load_component` has loaded it, by its headers. Thread: any."""
    infos = [info for info in checkpoint.infos(component) if not is_unused(info.name, unused)]
    keep = keeps_quantized_component(checkpoint, component, policy)
    return planned_nbytes(infos, keep_quantized=keep, dense_dtype=dense_dtype(component))


def load_component(
    model: nn.Module,
    checkpoint: Checkpoint,
    component: str,
    choices: LoadChoices,
    span: tuple[float, float] = (0.0, 1.0),
    *,
    unused: tuple[str, ...] = (),
) -> WeightReport:
    """Give every parameter of `model` the component's tensor of that name, LoRAs merged.

    Names may have or lack a leading `model.`; a head that the model lacks is passed over. Thread: the MLX thread.

    Args:
        model: its attributes are called what the component's tensors are.
        checkpoint: the pipeline.
        component: which part of it.
        choices: the policy of quantised weights, the LoRAs, and who is told of the progress.
        span: which part of the whole load this is, 0 to 1.
        unused: what the names of tensors begin with (without `model.`) that the model rightly has no parameter for:
            `layers.35.` of a text encoder whose last layer nobody asks.

    Raises:
        CheckpointError: a tensor is missing, extra, misshaped or unreadable.
        QuantizationError: a tensor is quantised in an unknown way.
    """
    low, high = span
    keep = keeps_quantized_component(checkpoint, component, choices.policy)
    dtype = dense_dtype(component)
    if choices.loras:
        checkpoint = MergedCheckpoint(checkpoint, component, choices.loras, dtype=dtype, requantize=keep)
    return load_weights(
        model,
        checkpoint,
        component=component,
        policy="keep" if keep else "float32",
        dense_dtype=dtype,
        progress=lambda done: choices.progress(low + (high - low) * done),
        unused=unused,
    )


def keeps_quantized_component(checkpoint: Checkpoint, component: str, policy: WeightPolicy) -> bool:
    """Whether a component's quantised weights stay so on this device. Thread: any."""
    if policy != "auto":
        return policy == "keep"
    here = device()
    needed = planned_nbytes(checkpoint.infos(component), keep_quantized=False, dense_dtype=dense_dtype(component))
    return keeps_quantized(policy, here.kind, needed, here.available_bytes)
