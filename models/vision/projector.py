"""What families share behind their towers: which layers' features count, and a projector of two matrices.

Source: LLaVA 1.5 (arXiv 2310.03744); transformers v5.24 `modeling_llava` and `modeling_mistral3`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.arch.base import Tensor
from models.arch.encoder_blocks import FILE, read_activation
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.ops import Activation, Linear, Ops

_SCORES = 32 << 20
"""No executor holds more scores than that: attention goes through a picture in pieces."""


@dataclass(frozen=True, slots=True)
class Projector:
    """Two matrices with an activation between."""

    linear_1: Linear
    linear_2: Linear
    activation: Activation


def projector(whole: ConfigReader, inputs: int, width: int, *, bias: bool) -> Projector:
    """Declare it; `whole` is config.json, which says its activation and, else than by default, its biases.

    Raises:
        CheckpointError: the activation is unknown.
    """
    biased = whole.flag("multimodal_projector_bias", default=bias)
    activation = read_activation(whole, "projector_hidden_act")
    name = "multi_modal_projector"
    first = Linear(f"{name}.linear_1", inputs, width, biased)
    return Projector(first, Linear(f"{name}.linear_2", width, width, biased), activation)


def projected(ops: Ops[Tensor], x: Tensor, w: Projector) -> Tensor:
    """Shapes: x (N, inputs); returns (N, width)."""
    return ops.linear(ops.activate(ops.linear(x, w.linear_1), w.activation), w.linear_2)


def feature_layers(whole: ConfigReader, layers: int, default: int) -> tuple[int, ...]:
    """Behind how many of a tower's layers features are taken, one number for each part that lies side by side.

    Raises:
        CheckpointError: `vision_feature_layer` names none of them.
    """
    key = "vision_feature_layer"
    is_list = isinstance(whole.value(key), list)
    numbers = whole.integers(key) if is_list else [whole.integer(key, default)]
    if not numbers or not all(-layers - 1 <= number <= layers for number in numbers):
        raise CheckpointError(f"{key} {numbers} names no layers of a tower of {layers}", file=FILE)
    return tuple(number % (layers + 1) for number in numbers)


def unused_layers(prefix: str, used: int, layers: int) -> tuple[str, ...]:
    """What the names of the tensors behind the last layer that counts begin with."""
    return tuple(f"{prefix}{number}." for number in range(used, layers))


def working_bytes(width: int, inner: int, heads: int) -> Callable[[int], int]:
    """What a pass takes besides weights: a layer's values in float32, and the scores that are held at once."""

    def predicted(patches: int) -> int:
        return 4 * (patches * (8 * width + 3 * inner) + min(heads * patches * patches, _SCORES))

    return predicted


def side_by_side(ops: Ops[Tensor], states: Sequence[Tensor], wanted: Sequence[int]) -> Tensor:
    """Of what each number of layers makes, the wanted ones. Shapes: (T, D) each; returns (T, len(wanted) * D)."""
    parts = [states[number] for number in wanted]
    return parts[0] if len(parts) == 1 else ops.join(parts, 1)
