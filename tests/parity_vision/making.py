"""The shared writer of the fixtures of vision-language models: `make(Fixture(...))` in a `make_<family>.py`.

A folder is a checkpoint as it is published (config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
the processor's files) and `reference.safetensors`, what transformers says of it in float32:

- `ids.N` int32 (L,): the processor's ids of prompt N, pictures expanded
- `pixel_values.K` float32: the processor's pixels of picture K alone, in its own shape, and beside them the other
  floats or whole numbers it gives for a picture, `NAME.K` (`image_grid_thw.K`)
- `features.K` float32 (rows, width): what stands in place of the embeddings of picture K
- `unnormed.K` float32 (rows, width): the same before a norm, where the decoder norms its embeddings as well
- `deep.K.L` float32 (rows, width): what is added to these behind layer L, where there is such a thing
- `logits.N` float32 (L, V): of every position, by one pass without a cache
- `continuation.N` int32 (12,): the greedy one, each token by a whole pass

with, as the file's metadata, JSON each: `prompts`, the texts with `[img-K]` in a picture's place; `pictures`, for each
prompt the numbers K in their order, places in `sorted(pictures/*.png)`; and `embedding_scale`, what the decoder
multiplies its table's rows by, `features` not being multiplied any more.

Weights are random by their names, so a second run gives the same bytes. What could not fail is refused: choices that
hang on last bits, a continuation that repeats itself, pictures that do not matter, a tensor that does not, a field of
`matters` or `processor_matters` that moves nothing.

Needs torch, transformers, Pillow and what `tests/parity/make_fixtures.py` needs.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from checks import (
    check_folder,
    check_rows,
    check_that_config_matters,
    check_that_pictures_matter,
    check_that_processor_matters,
    check_that_tensors_matter,
    check_tokens,
)
from fixture import HERE, PICTURES, PROMPTS, Arrays, Fixture, pictures_of
from reference_model import (
    built,
    extended,
    features_of,
    image_token,
    inner_of,
    input_of,
    inputs_of,
    load_weights,
    logits_of,
)
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, processors
from transformers import PreTrainedModel, logging

import tiny_tokenizer  # isort: skip - found by what `fixture` adds to the path
from make_fixtures import LEAST_MARGIN, random_tensor  # isort: skip

CONTINUATION = 12
LEAST_DISTINCT = 5
SEEDS = 60


def make(fixture: Fixture) -> None:
    """Write the folder anew, and say so; SystemExit with the reason for a fixture that could not fail."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = HERE / fixture.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _write_files(fixture, folder)
    processor = fixture.processor(folder)
    model = built(fixture.config)
    for seed in range(1, SEEDS):
        weights = _random_weights(fixture, model, seed)
        load_weights(model, weights)
        reference, margin = _reference(fixture, model, processor)
        if margin >= LEAST_MARGIN and len(set(reference["continuation.0"].tolist())) >= LEAST_DISTINCT:
            break
    else:
        raise SystemExit(f"{fixture.name}: no seed gives clear choices")
    _write_weights(fixture, model, folder)
    metadata = {
        "prompts": json.dumps(PROMPTS),
        "pictures": json.dumps([pictures_of(prompt) for prompt in PROMPTS]),
        "embedding_scale": json.dumps(_embedding_scale(model, reference["ids.3"])),
    }
    save_file(reference, folder / "reference.safetensors", metadata)
    _settle(folder / "reference.safetensors")
    check_folder(fixture, folder, processor, reference)
    check_that_pictures_matter(fixture, model, processor, reference)
    check_that_tensors_matter(fixture, model, processor, reference, weights)
    check_that_config_matters(fixture, processor, reference, weights)
    check_that_processor_matters(fixture, folder, processor)
    size = sum(file.stat().st_size for file in folder.iterdir())
    shapes = {name: list(value.shape) for name, value in reference.items() if name.startswith(("pixel", "feat"))}
    print(f"{fixture.name}: seed {seed}, margin {margin:.3f}, {size / 1000:.0f} kB, {shapes}")


def _write_files(fixture: Fixture, folder: Path) -> None:
    tokenizer = tiny_tokenizer.build()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in fixture.special])
    if fixture.bos:
        bos = tiny_tokenizer.SPECIAL[tiny_tokenizer.BOS]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tiny_tokenizer.BOS)]
        )
    check_tokens(fixture, tokenizer)
    tiny_tokenizer.write(tokenizer, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"add_bos_token": fixture.bos, **fixture.tokenizer}
    path.write_text(json.dumps(settings, indent=1))
    (folder / "config.json").write_text(json.dumps(fixture.config, indent=1))
    for name, content in fixture.files.items():
        (folder / name).write_text(json.dumps(content, indent=1))


def _random_weights(fixture: Fixture, model: PreTrainedModel, seed: int) -> Arrays:
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    shapes |= {name: tuple(value.shape) for name, value in model.named_buffers() if name in model.state_dict()}
    made = {name: _random(name, shape, seed) for name, shape in shapes.items()}
    less = {name for name in made if fixture.less_one and re.search(fixture.less_one, name)}
    return {name: value - np.float32(1) if name in less else value for name, value in made.items()}


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if name.endswith("lambda1"):
        # Published checkpoints have no such tensors, for they do nothing.
        return np.ones(shape, np.float32)
    if not shape:
        # What values are clipped to: some are.
        drawn = random_tensor(name, (1,), seed)[0] / 5
        return np.array(drawn + (1.5 if name.endswith("max") else -1.5), np.float32)
    drawn = random_tensor(name, shape, seed)
    if "position" in name and "embed" in name:
        return drawn / drawn.std() * np.float32(0.5)
    if len(shape) > 2:
        # What a convolution sums is all of a patch.
        return drawn / drawn.std() * np.float32(1.1 / np.prod(shape[1:]) ** 0.5)
    return drawn


def _greedy(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor
) -> tuple[list[int], float]:
    """The continuation, and the least distance of a first from a second choice."""
    tokens, margin = [], float("inf")
    for _ in range(CONTINUATION):
        first, second = torch.topk(logits[-1], 2).values.tolist()
        margin = min(margin, first - second)
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] >= tiny_tokenizer.VOCAB_SIZE:
            # One of the family's special tokens: there is no picture to go with it.
            return tokens, 0.0
        inputs = extended(inputs, tokens[-1])
        logits, _ = logits_of(model, inputs)
    return tokens, margin


def _reference(fixture: Fixture, model: PreTrainedModel, processor: Any) -> tuple[Arrays, float]:
    arrays: Arrays = {}
    margin = float("inf")
    for number in range(len(PICTURES)):
        inputs = inputs_of(fixture, processor, f"[img-{number}]")
        text = {name for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
        for name in set(inputs) - text:
            value = inputs[name].numpy()
            arrays[f"{name}.{number}"] = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
        rows, *deep = features_of(model, inputs)
        arrays[f"features.{number}"] = rows
        if (norm := getattr(inner_of(model), "perception_emb_norm", None)) is not None:
            arrays[f"unnormed.{number}"] = input_of(norm, model, inputs)
        arrays |= {f"deep.{number}.{layer}": value for layer, value in enumerate(deep)}
    for number, prompt in enumerate(PROMPTS):
        inputs = inputs_of(fixture, processor, prompt)
        logits, seen = logits_of(model, inputs)
        check_rows(fixture, arrays, prompt, seen["inputs_embeds"][0], inputs["input_ids"][0] == image_token(model))
        continuation, least = _greedy(model, inputs, logits)
        margin = min(margin, least)
        arrays[f"ids.{number}"] = inputs["input_ids"][0].numpy().astype(np.int32)
        arrays[f"logits.{number}"] = logits.float().numpy().copy()
        arrays[f"continuation.{number}"] = np.array(continuation, np.int32)
        if margin < LEAST_MARGIN:
            break
    return arrays, margin if "continuation.3" in arrays else 0.0


def _embedding_scale(model: PreTrainedModel, ids: np.ndarray) -> float:
    """What the decoder multiplies its table's rows by."""
    with torch.inference_mode():
        table = model.get_input_embeddings()
        row = table.weight[int(ids[0])]
        return float(table(torch.tensor([int(ids[0])]))[0].norm() / row.norm())


def _write_weights(fixture: Fixture, model: PreTrainedModel, folder: Path) -> None:
    with TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        with safe_open(Path(temporary, "model.safetensors"), "numpy") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(fixture.published(stored) | dict(fixture.extra), folder / "model.safetensors", {"format": "pt"})


def _settle(path: Path) -> None:
    """Have a file's metadata in the order of its keys: the library's own order is another each time."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
