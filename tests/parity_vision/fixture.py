"""What a family's fixture is made of, and the prompts and pictures that all of them have: see `making.py`."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))

import tiny_tokenizer  # noqa: E402 - lies in another folder of scripts

PICTURES = tuple(sorted((HERE / "pictures").glob("*.png")))
PROMPTS = (
    "she sells [img-0] and then the other fox said",
    "the fox [img-0] jumps over [img-1] and the dog",
    "[img-1] there is no one here that",
    "that is the other thing, héllo 世界 and 42 dogs",
)
PLACE = re.compile(r"\[img-(\d+)\]")

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


def pictures_of(prompt: str) -> list[int]:
    """The numbers of a prompt's pictures."""
    return [int(number) for number in PLACE.findall(prompt)]


def merged(tree: JSONFile, change: JSONFile) -> dict[str, Any]:
    """A tree with some leaves changed."""
    made = dict(deepcopy(tree))
    for key, value in change.items():
        made[key] = merged(made[key], value) if isinstance(value, Mapping) and key in made else value
    return made
