"""What the layers of a pipeline's text encoder make of a text, for tests of how its weights are loaded."""

from pathlib import Path

import numpy as np

from models.arch import Model, build_model
from models.checkpoint import open_checkpoint
from models.image.base import LoadChoices
from models.image.encoders import load_encoder, predicted
from models.image.loading import ComponentView, component_view

TOKENS = (3, 17, 101, 44, 44, 250, 8, 61, 2)


def opened(reference: object, store: Path) -> tuple[ComponentView, Model]:
    """A pipeline's text encoder with all of its layers, and no head."""
    view = component_view(open_checkpoint(str(reference), store), "text_encoder")
    headless = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    return view, build_model({**view.config, **headless})


def residuals(
    reference: object,
    store: Path,
    choices: LoadChoices | None = None,
    *,
    layers: tuple[int, ...] = (),
    span: tuple[float, float] = (0.0, 1.0),
    unused: tuple[str, ...] = (),
) -> np.ndarray:
    """The residual stream behind so many layers each, or behind every layer. Shapes: (layers, T, D)."""
    view, model = opened(reference, store)
    layers = layers or tuple(range(1, model.config.num_layers + 1))
    chosen = choices or LoadChoices(policy="float32")
    encoder = load_encoder(view, model, chosen, layers, span=span, unused=unused)
    found = encoder.residuals(TOKENS, layers)
    encoder.close()
    return found


def weight_bytes(reference: object, store: Path, choices: LoadChoices) -> int:
    """What its weights are going to take."""
    view, model = opened(reference, store)
    return predicted(view, model, choices, (model.config.num_layers,), ()).weights
