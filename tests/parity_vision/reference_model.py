"""The reference's model of a fixture: built, filled, and asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from fixture import PICTURES, PLACE, Arrays, Fixture, JSONFile, pictures_of
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel


def built(config_json: JSONFile) -> PreTrainedModel:
    with TemporaryDirectory() as temporary:
        # Some configurations tell otherwise what they are given piece by piece, so they read a file.
        Path(temporary, "config.json").write_text(json.dumps(config_json))
        config = AutoConfig.from_pretrained(temporary)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def load_weights(model: PreTrainedModel, weights: Arrays) -> None:
    tensors = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = set(model.state_dict()) - set(dict(model.named_parameters())) - set(weights)
    if unexpected or set(missing) - tied:
        raise SystemExit(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()


def inputs_of(fixture: Fixture, processor: Any, prompt: str) -> dict[str, torch.Tensor]:
    pictures = [Image.open(PICTURES[number]).convert("RGB") for number in pictures_of(prompt)]
    text = PLACE.sub(fixture.placeholder, prompt)
    told = {name: getattr(processor.image_processor, name) for name in fixture.told}
    made = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt", images_kwargs=told)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def image_token(model: PreTrainedModel) -> int:
    config = model.config
    return int(getattr(config, "image_token_id", None) or config.image_token_index)


def inner_of(model: PreTrainedModel) -> torch.nn.Module:
    return getattr(model, "model", model)


def language_of(model: PreTrainedModel) -> torch.nn.Module:
    inner = inner_of(model)
    return getattr(inner, "language_model", None) or inner.text_model


@torch.inference_mode()
def logits_of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """The logits of all positions, and what the language model was called with. Shapes: (L, V)."""
    seen: dict[str, Any] = {}
    hook = language_of(model).register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    if hasattr(inner_of(model), "rope_deltas"):
        inner_of(model).rope_deltas = None
    try:
        logits = model(**inputs, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits, seen


def features_of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    """The rows in place of the embeddings, and behind them those that are added deeper."""
    _, seen = logits_of(model, inputs)
    rows = seen["inputs_embeds"][0][inputs["input_ids"][0] == image_token(model)]
    deep = seen.get("deepstack_visual_embeds") or []
    return [value.float().numpy().copy() for value in (rows, *deep)]


def input_of(module: torch.nn.Module, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
    """What a module is called with in a pass."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, values: seen.append(values[0]))
    try:
        logits_of(model, inputs)
    finally:
        hook.remove()
    return seen[0].float().numpy().copy()


def extended(inputs: Mapping[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
    """The inputs of one token of text more."""
    length = inputs["input_ids"].shape[1]
    fill = {"input_ids": token, "attention_mask": 1}
    made = dict(inputs)
    for name, value in inputs.items():
        if value.shape == (1, length):
            more = torch.full((1, 1), fill.get(name, 0), dtype=value.dtype)
            made[name] = torch.cat([value, more], dim=1)
    return made
