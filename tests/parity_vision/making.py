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
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, logging

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))

import tiny_tokenizer  # noqa: E402 - lies in another folder of scripts
from make_fixtures import LEAST_MARGIN, random_tensor  # noqa: E402

PICTURES = tuple(sorted((HERE / "pictures").glob("*.png")))
PROMPTS = (
    "she sells [img-0] and then the other fox said",
    "the fox [img-0] jumps over [img-1] and the dog",
    "[img-1] there is no one here that",
    "that is the other thing, héllo 世界 and 42 dogs",
)
PLACE = re.compile(r"\[img-(\d+)\]")
CONTINUATION = 12
LEAST_DISTINCT = 5
LEAST_EFFECT = 0.01
SEEDS = 60

Arrays = dict[str, np.ndarray]
JSONFile = Mapping[str, Any]


def of_pillow(folder: Path) -> Any:
    """A folder's processor, made of Pillow's operations."""
    return AutoProcessor.from_pretrained(folder, backend="pil")


@dataclass(frozen=True)
class Fixture:
    """What a family's fixture is made of."""

    name: str
    """Of the folder beside this file."""
    config: JSONFile
    """config.json, `architectures` and `model_type` included; `vocab_size` is `vocabulary(special)`."""
    files: Mapping[str, JSONFile]
    """The processor's files by name, as published checkpoints have them (`preprocessor_config.json`, ...)."""
    special: tuple[str, ...]
    """Special tokens of the family; their ids go on behind those of all fixtures, see `token_id`."""
    placeholder: str
    """What a user's prompt of the processor has in a picture's place."""
    tokenizer: JSONFile = field(default_factory=dict)
    """What tokenizer_config.json has besides (`image_token`, `boi_token`, ...)."""
    bos: bool = False
    """Whether the tokenizer puts BOS in front of a text."""
    less_one: str = ""
    """A pattern searched in names: norms that are stored less one, as Gemma's are."""
    idle: str = ""
    """A pattern searched in names: tensors of the tower that rightly do nothing (of a layer that is not asked)."""
    matters: tuple[JSONFile, ...] = ()
    """Changes of config.json, as nested as it is, each of which must move the features or the logits."""
    processor_matters: tuple[tuple[str, JSONFile], ...] = ()
    """Changes of a processor's file, each of which must move pixels or ids."""
    told: tuple[str, ...] = ()
    """Fields of preprocessor_config.json that the reference's processor has to be told in its call as well."""
    published: Callable[[Arrays], Arrays] = dict
    """Turns the tensors as `save_pretrained` names them into those of the file, where published ones differ."""
    processor: Callable[[Path], Any] = of_pillow
    """Reads the processor of a folder."""
    extra: Arrays = field(default_factory=dict)
    """Tensors that published files have besides and nothing needs."""


def token_id(special: Sequence[str], token: str) -> int:
    """The id of one of a family's special tokens."""
    return tiny_tokenizer.VOCAB_SIZE + list(special).index(token)


def vocabulary(special: Sequence[str]) -> int:
    """How many tokens there are."""
    return tiny_tokenizer.VOCAB_SIZE + len(special)


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
    model = _built(fixture.config)
    for seed in range(1, SEEDS):
        weights = _random_weights(fixture, model, seed)
        _load(model, weights)
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
    _check_folder(fixture, folder, processor, reference)
    _check_that_pictures_matter(fixture, model, processor, reference)
    _check_that_tensors_matter(fixture, model, processor, reference, weights)
    _check_that_config_matters(fixture, processor, reference, weights)
    _check_that_processor_matters(fixture, folder, processor)
    size = sum(file.stat().st_size for file in folder.iterdir())
    shapes = {name: list(value.shape) for name, value in reference.items() if name.startswith(("pixel", "feat"))}
    print(f"{fixture.name}: seed {seed}, margin {margin:.3f}, {size / 1000:.0f} kB, {shapes}")


def pictures_of(prompt: str) -> list[int]:
    """The numbers of a prompt's pictures."""
    return [int(number) for number in PLACE.findall(prompt)]


def merged(tree: JSONFile, change: JSONFile) -> dict[str, Any]:
    """A tree with some leaves changed."""
    made = dict(deepcopy(tree))
    for key, value in change.items():
        made[key] = merged(made[key], value) if isinstance(value, Mapping) and key in made else value
    return made


def _write_files(fixture: Fixture, folder: Path) -> None:
    tokenizer = tiny_tokenizer.build()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in fixture.special])
    if fixture.bos:
        bos = tiny_tokenizer.SPECIAL[tiny_tokenizer.BOS]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tiny_tokenizer.BOS)]
        )
    _check_tokens(fixture, tokenizer)
    tiny_tokenizer.write(tokenizer, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"add_bos_token": fixture.bos, **fixture.tokenizer}
    path.write_text(json.dumps(settings, indent=1))
    (folder / "config.json").write_text(json.dumps(fixture.config, indent=1))
    for name, content in fixture.files.items():
        (folder / name).write_text(json.dumps(content, indent=1))


def _check_tokens(fixture: Fixture, tokenizer: Tokenizer) -> None:
    for token in fixture.special:
        if tokenizer.token_to_id(token) != token_id(fixture.special, token):
            raise SystemExit(f"{fixture.name}: {token} has the id {tokenizer.token_to_id(token)}")


def _built(config_json: JSONFile) -> PreTrainedModel:
    with TemporaryDirectory() as temporary:
        # Some configurations tell otherwise what they are given piece by piece, so they read a file.
        Path(temporary, "config.json").write_text(json.dumps(config_json))
        config = AutoConfig.from_pretrained(temporary)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


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


def _load(model: PreTrainedModel, weights: Arrays) -> None:
    tensors = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = set(model.state_dict()) - set(dict(model.named_parameters())) - set(weights)
    if unexpected or set(missing) - tied:
        raise SystemExit(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()


def _inputs(fixture: Fixture, processor: Any, prompt: str) -> dict[str, torch.Tensor]:
    pictures = [Image.open(PICTURES[number]).convert("RGB") for number in pictures_of(prompt)]
    text = PLACE.sub(fixture.placeholder, prompt)
    told = {name: getattr(processor.image_processor, name) for name in fixture.told}
    made = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt", images_kwargs=told)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def _image_token(model: PreTrainedModel) -> int:
    config = model.config
    return int(getattr(config, "image_token_id", None) or config.image_token_index)


def _inner(model: PreTrainedModel) -> torch.nn.Module:
    return getattr(model, "model", model)


def _language(model: PreTrainedModel) -> torch.nn.Module:
    inner = _inner(model)
    return getattr(inner, "language_model", None) or inner.text_model


@torch.inference_mode()
def _run(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """The logits of all positions, and what the language model was called with. Shapes: (L, V)."""
    seen: dict[str, Any] = {}
    hook = _language(model).register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    if hasattr(_inner(model), "rope_deltas"):
        _inner(model).rope_deltas = None
    try:
        logits = model(**inputs, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits, seen


def _features(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    """The rows in place of the embeddings, and behind them those that are added deeper."""
    _, seen = _run(model, inputs)
    rows = seen["inputs_embeds"][0][inputs["input_ids"][0] == _image_token(model)]
    deep = seen.get("deepstack_visual_embeds") or []
    return [value.float().numpy().copy() for value in (rows, *deep)]


def _input_of(module: torch.nn.Module, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
    """What a module is called with in a pass."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, values: seen.append(values[0]))
    try:
        _run(model, inputs)
    finally:
        hook.remove()
    return seen[0].float().numpy().copy()


def _extended(inputs: Mapping[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
    """The inputs of one token of text more."""
    length = inputs["input_ids"].shape[1]
    fill = {"input_ids": token, "attention_mask": 1}
    made = dict(inputs)
    for name, value in inputs.items():
        if value.shape == (1, length):
            more = torch.full((1, 1), fill.get(name, 0), dtype=value.dtype)
            made[name] = torch.cat([value, more], dim=1)
    return made


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
        inputs = _extended(inputs, tokens[-1])
        logits, _ = _run(model, inputs)
    return tokens, margin


def _reference(fixture: Fixture, model: PreTrainedModel, processor: Any) -> tuple[Arrays, float]:
    arrays: Arrays = {}
    margin = float("inf")
    for number in range(len(PICTURES)):
        inputs = _inputs(fixture, processor, f"[img-{number}]")
        text = {name for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
        for name in set(inputs) - text:
            value = inputs[name].numpy()
            arrays[f"{name}.{number}"] = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
        rows, *deep = _features(model, inputs)
        arrays[f"features.{number}"] = rows
        if (norm := getattr(_inner(model), "perception_emb_norm", None)) is not None:
            arrays[f"unnormed.{number}"] = _input_of(norm, model, inputs)
        arrays |= {f"deep.{number}.{layer}": value for layer, value in enumerate(deep)}
    for number, prompt in enumerate(PROMPTS):
        inputs = _inputs(fixture, processor, prompt)
        logits, seen = _run(model, inputs)
        _check_rows(fixture, arrays, prompt, seen["inputs_embeds"][0], inputs["input_ids"][0] == _image_token(model))
        continuation, least = _greedy(model, inputs, logits)
        margin = min(margin, least)
        arrays[f"ids.{number}"] = inputs["input_ids"][0].numpy().astype(np.int32)
        arrays[f"logits.{number}"] = logits.float().numpy().copy()
        arrays[f"continuation.{number}"] = np.array(continuation, np.int32)
        if margin < LEAST_MARGIN:
            break
    return arrays, margin if "continuation.3" in arrays else 0.0


def _check_rows(fixture: Fixture, arrays: Arrays, prompt: str, embeds: torch.Tensor, places: torch.Tensor) -> None:
    """A picture's rows are the same alone and in company."""
    if not pictures_of(prompt):
        return
    alone = np.concatenate([arrays[f"features.{number}"] for number in pictures_of(prompt)])
    rows = embeds[places].float().numpy()
    if rows.shape != alone.shape or np.abs(rows - alone).max() > 1e-4:
        raise SystemExit(f"{fixture.name}: pictures differ alone and in {prompt!r}")


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


def _check_folder(fixture: Fixture, folder: Path, processor: Any, reference: Arrays) -> None:
    """The folder is a checkpoint like any other: the reference library's own loader gets the same model out of it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    logits, _ = _run(model.eval(), _inputs(fixture, processor, PROMPTS[1]))
    difference = float(np.abs(logits.numpy() - reference["logits.1"]).max())
    if difference > 1e-4:
        raise SystemExit(f"{fixture.name}: read back, its logits differ by {difference:.2g}")


def _check_that_pictures_matter(fixture: Fixture, model: PreTrainedModel, processor: Any, reference: Arrays) -> None:
    for black in (False, True):
        inputs = _inputs(fixture, processor, PROMPTS[0])
        pixels = inputs["pixel_values"]
        # A black picture, and the same one turned round.
        inputs["pixel_values"] = torch.full_like(pixels, -1.0) if black else torch.flip(pixels, (-1, -2))
        logits, _ = _run(model, inputs)
        _must_move(fixture, "another picture", logits.numpy()[-1] - reference["logits.0"][-1])


def _check_that_tensors_matter(
    fixture: Fixture, model: PreTrainedModel, processor: Any, reference: Arrays, weights: Arrays
) -> None:
    """Every tensor of tower and projector moves the features when every other value is halved."""
    heads = [head for head in (_language(model), model.get_output_embeddings()) if head is not None]
    language = {id(value) for head in heads for value in head.parameters()}
    inputs = _inputs(fixture, processor, "[img-0]")
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
            made = _features(model, inputs)
            parameters[name].copy_(torch.from_numpy(weights[name]))
        known = [reference["features.0"], *(reference[f"deep.0.{layer}"] for layer in range(len(made) - 1))]
        _must_move(fixture, name, np.concatenate(made) - np.concatenate(known), LEAST_EFFECT / 10)


def _check_that_config_matters(fixture: Fixture, processor: Any, reference: Arrays, weights: Arrays) -> None:
    for change in fixture.matters:
        changed = _built(merged(fixture.config, change))
        _load(changed, weights)
        inputs = _inputs(fixture, processor, PROMPTS[1])
        logits, _ = _run(changed, inputs)
        _must_move(fixture, str(change), logits.numpy() - reference["logits.1"])


def _check_that_processor_matters(fixture: Fixture, folder: Path, processor: Any) -> None:
    known = [_inputs(fixture, processor, prompt) for prompt in PROMPTS[:2]]
    for file, change in fixture.processor_matters:
        with TemporaryDirectory() as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            Path(temporary, file).write_text(json.dumps(merged(fixture.files[file], change)))
            other = fixture.processor(Path(temporary))
        made = [_inputs(fixture, other, prompt) for prompt in PROMPTS[:2]]
        if not any(_differ(a, b) for a, b in zip(known, made, strict=True)):
            raise SystemExit(f"{fixture.name}: {file}: {change} moves nothing")


def _differ(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    same = all(one[name].shape == other[name].shape for name in ("input_ids", "pixel_values"))
    return not same or float((one["pixel_values"] - other["pixel_values"]).abs().max()) > LEAST_EFFECT


def _must_move(fixture: Fixture, what: str, difference: np.ndarray, least: float = LEAST_EFFECT) -> None:
    effect = float(np.abs(difference).max())
    if effect < least:
        raise SystemExit(f"{fixture.name}: {what} moves things by {effect:.2g} only")
