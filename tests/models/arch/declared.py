"""What a model declares, laid out for comparison."""

from typing import Any

from models.arch import Model, build_model
from models.ops import weights_in

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    # The same in GPT-2's words.
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 3,
    "n_head": 4,
}


def build(architecture: str, **said: Any) -> Model:
    return build_model(SIZES | {"architectures": [architecture]} | said)


def tensors(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every declared tensor, by name."""
    return dict(tensor for weight in weights_in(model.weights) for tensor in weight.tensors())


def biases(model: Model) -> set[str]:
    """The biases of its second layer."""
    start, end = "model.layers.1.", ".bias"
    return {
        name.removeprefix(start).removesuffix(end) for name in tensors(model) if name.startswith(start) and end in name
    }


def windows(model: Model) -> tuple[int | None, ...]:
    return tuple(state.window for state in model.state)
