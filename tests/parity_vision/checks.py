"""What a fixture must stand: it is refused if it could not fail. Each check raises SystemExit with the reason."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from fixture import PROMPTS, Arrays, Fixture, merged, pictures_of, token_id
from reference_model import built, features_of, inputs_of, language_of, load_weights, logits_of
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, PreTrainedModel

LEAST_EFFECT = 0.01


def check_tokens(fixture: Fixture, tokenizer: Tokenizer) -> None:
    for token in fixture.special:
        if tokenizer.token_to_id(token) != token_id(fixture.special, token):
            raise SystemExit(f"{fixture.name}: {token} has the id {tokenizer.token_to_id(token)}")


def check_rows(fixture: Fixture, arrays: Arrays, prompt: str, embeds: torch.Tensor, places: torch.Tensor) -> None:
    """A picture's rows are the same alone and in company."""
    if not pictures_of(prompt):
        return
    alone = np.concatenate([arrays[f"features.{number}"] for number in pictures_of(prompt)])
    rows = embeds[places].float().numpy()
    if rows.shape != alone.shape or np.abs(rows - alone).max() > 1e-4:
        raise SystemExit(f"{fixture.name}: pictures differ alone and in {prompt!r}")


def check_folder(fixture: Fixture, folder: Path, processor: Any, reference: Arrays) -> None:
    """The folder is a checkpoint like any other: the reference library's own loader gets the same model out of it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    logits, _ = logits_of(model.eval(), inputs_of(fixture, processor, PROMPTS[1]))
    difference = float(np.abs(logits.numpy() - reference["logits.1"]).max())
    if difference > 1e-4:
        raise SystemExit(f"{fixture.name}: read back, its logits differ by {difference:.2g}")


def check_that_pictures_matter(fixture: Fixture, model: PreTrainedModel, processor: Any, reference: Arrays) -> None:
    for black in (False, True):
        inputs = inputs_of(fixture, processor, PROMPTS[0])
        pixels = inputs["pixel_values"]
        # A black picture, and the same one turned round.
        inputs["pixel_values"] = torch.full_like(pixels, -1.0) if black else torch.flip(pixels, (-1, -2))
        logits, _ = logits_of(model, inputs)
        _must_move(fixture, "another picture", logits.numpy()[-1] - reference["logits.0"][-1])


def check_that_tensors_matter(
    fixture: Fixture, model: PreTrainedModel, processor: Any, reference: Arrays, weights: Arrays
) -> None:
    """Every tensor of tower and projector moves the features when every other value is halved."""
    heads = [head for head in (language_of(model), model.get_output_embeddings()) if head is not None]
    language = {id(value) for head in heads for value in head.parameters()}
    inputs = inputs_of(fixture, processor, "[img-0]")
    parameters = dict(model.named_parameters())
    # What values are clipped to is in buffers.
    parameters |= {name: value for name, value in model.named_buffers() if name in weights}
    names = [name for name, value in parameters.items() if id(value) not in language and "language_model" not in name]
    for name in names:
        if re.search(fixture.idle or "$^", name) or name.endswith("k_proj.bias"):
            # What is added to all keys moves all of a query's scores alike.
            continue
        with torch.no_grad():
            # Not all of it: a norm behind would make up for that.
            parameters[name].view(-1)[::2].mul_(0.5)
            made = features_of(model, inputs)
            parameters[name].copy_(torch.from_numpy(weights[name]))
        known = [reference["features.0"], *(reference[f"deep.0.{layer}"] for layer in range(len(made) - 1))]
        _must_move(fixture, name, np.concatenate(made) - np.concatenate(known), LEAST_EFFECT / 10)


def check_that_config_matters(fixture: Fixture, processor: Any, reference: Arrays, weights: Arrays) -> None:
    for change in fixture.matters:
        changed = built(merged(fixture.config, change))
        load_weights(changed, weights)
        inputs = inputs_of(fixture, processor, PROMPTS[1])
        logits, _ = logits_of(changed, inputs)
        _must_move(fixture, str(change), logits.numpy() - reference["logits.1"])


def check_that_processor_matters(fixture: Fixture, folder: Path, processor: Any) -> None:
    known = [inputs_of(fixture, processor, prompt) for prompt in PROMPTS[:2]]
    for file, change in fixture.processor_matters:
        with TemporaryDirectory() as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            Path(temporary, file).write_text(json.dumps(merged(fixture.files[file], change)))
            other = fixture.processor(Path(temporary))
        made = [inputs_of(fixture, other, prompt) for prompt in PROMPTS[:2]]
        if not any(_differ(a, b) for a, b in zip(known, made, strict=True)):
            raise SystemExit(f"{fixture.name}: {file}: {change} moves nothing")


def _differ(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    same = all(one[name].shape == other[name].shape for name in ("input_ids", "pixel_values"))
    return not same or float((one["pixel_values"] - other["pixel_values"]).abs().max()) > LEAST_EFFECT


def _must_move(fixture: Fixture, what: str, difference: np.ndarray, least: float = LEAST_EFFECT) -> None:
    effect = float(np.abs(difference).max())
    if effect < least:
        raise SystemExit(f"{fixture.name}: {what} moves things by {effect:.2g} only")
