"""A prompt with pictures as the executors are told of it: by a fixture's own family, with the reference's rows."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from models.checkpoint import open_checkpoint
from models.executors.base import EncodedPicture, Executor, Row, Span, Step
from models.tokenizer import Tokenizer, load_tokenizer
from models.vision import PLACE, Pixels, Vision, family_of
from models.vision.positions import positions_of
from models.weights.matching import model_of

HERE = Path(__file__).parent
FOLDERS = sorted(folder.parent.name for folder in HERE.glob("*/reference.safetensors"))
PICTURES = sorted((HERE / "pictures").glob("*.png"))
EXECUTORS = ("onnx", "mlx")
SLOTS = 9
CAPACITY = 512
LONGEST_STEP = 256
_TAG = re.compile(r"\[img-(\d+)\]")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a fixture with the reference's answers to it."""

    text: str
    ids: list[int]
    logits: np.ndarray
    continuation: list[int]


@dataclass(frozen=True, slots=True)
class Placed:
    """Consecutive places of a picture, [begin, end) of a row's tokens."""

    begin: int
    end: int
    picture: EncodedPicture
    first_row: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A prompt's tokens, and what stands in their place."""

    tokens: list[int]
    placed: list[Placed]
    positions: tuple[tuple[int, int, int], ...]
    shift: int
    two_way: bool

    def row(self, slot: int, begin: int, tokens: Sequence[int]) -> Row:
        """What the executor is told of some of its tokens, or of what follows them."""
        end, spans, runs = begin + len(tokens), [], []
        for each in self.placed:
            first, last = max(each.begin, begin), min(each.end, end)
            if first < last:
                skipped = each.first_row - each.begin
                spans.append(Span(first - begin, each.picture, first + skipped, last + skipped))
            if self.two_way and begin <= each.begin and each.end <= end:
                runs.append((each.begin - begin, each.end - begin))
        told = self.positions[begin:end]
        if told:
            behind = range(max(begin, len(self.tokens)), end)
            told = (*told, *((place + self.shift,) * 3 for place in behind))
        return Row(slot, begin, tuple(tokens), len(tokens), self.shift, told, tuple(spans), tuple(runs))

    def cuts(self, size: int) -> list[int]:
        """Where chunks of that size may end: behind a run that looks both ways, where they would within."""
        ends = []
        for end in range(size, len(self.tokens), size):
            within = [each.end for each in self.placed if self.two_way and each.begin < end < each.end]
            ends.append(within[0] if within else end)
        return sorted(set(ends))


def read_prompts(name: str) -> list[Prompt]:
    path = HERE / name / "reference.safetensors"
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        texts = json.loads(file.metadata()["prompts"])
    return [
        Prompt(text, arrays[f"ids.{n}"].tolist(), arrays[f"logits.{n}"], arrays[f"continuation.{n}"].tolist())
        for n, text in enumerate(texts)
    ]


def pixels_of(number: int) -> Pixels:
    return np.asarray(Image.open(PICTURES[number]).convert("RGB"))


@dataclass(frozen=True, slots=True)
class Sight:
    """A fixture's vision and vocabulary, and its pictures as the reference's tower has them."""

    vision: Vision
    tokenizer: Tokenizer
    pictures: list[EncodedPicture]


def sight_of(name: str) -> Sight:
    checkpoint = open_checkpoint(str(HERE / name), HERE / "no-store")
    tokenizer = load_tokenizer(checkpoint)
    family = family_of(checkpoint)
    assert family is not None
    vision = family.build(checkpoint, lambda text: tokenizer.encode(text, add_bos=False))
    return Sight(vision, tokenizer, encoded_pictures(name))


def encoded_pictures(name: str) -> list[EncodedPicture]:
    """What the reference's tower makes of each picture, as the decoder's table would have it."""
    path = HERE / name / "reference.safetensors"
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        scale = json.loads(file.metadata()["embedding_scale"])
    pictures = []
    for number in range(len(PICTURES)):
        deep = sorted((key for key in arrays if key.startswith(f"deep.{number}.")), key=lambda key: int(key[7:]))
        rows = arrays.get(f"unnormed.{number}")
        rows = arrays[f"features.{number}"] / np.float32(scale) if rows is None else rows
        pictures.append(EncodedPicture(rows, tuple(arrays[k] for k in deep)))
    return pictures


def planned(sight: Sight, text: str) -> Planned:
    """The prompt cut at its tags, and pictures' expansions in their place."""
    tokens: list[int] = []
    placed: list[Placed] = []
    grids: list[tuple[int, tuple[int, int]]] = []
    for index, part in enumerate(_TAG.split(text)):
        if index % 2 == 0:
            tokens += sight.tokenizer.encode(part, add_bos=index == 0)
            continue
        prepared = sight.vision.prepare(pixels_of(int(part)))
        if prepared.grid is not None:
            grids.append((len(tokens) + prepared.expansion.index(PLACE), prepared.grid))
        placed += _placed(prepared.expansion, len(tokens), sight.pictures[int(part)])
        tokens += [sight.vision.filler if token == PLACE else token for token in prepared.expansion]
    positions, shift = positions_of(len(tokens), grids) if grids else ((), 0)
    return Planned(tokens, placed, positions, shift, sight.vision.longest_run is not None)


def _placed(expansion: Sequence[int], start: int, picture: EncodedPicture) -> Iterator[Placed]:
    """The runs of places in an expansion that begins at `start`."""
    row = 0
    for is_place, group in groupby(expansion, lambda token: token == PLACE):
        count = len(list(group))
        if is_place:
            yield Placed(start, start + count, picture, row)
            row += count
        start += count


def load(name: str, kind: str, *, weights: str = "float32", cache_type: str = "f16") -> Executor:
    """The fixture's language part on an executor of that kind."""
    checkpoint = open_checkpoint(str(HERE / name), HERE / "no-store")
    model = model_of(checkpoint)
    if kind == "onnx":
        from models.executors.onnx import OnnxExecutor, OnnxOptions
        from models.executors.onnx import load as load_onnx

        options = OnnxOptions(
            weights=weights,
            cache_type=cache_type,
            slots=SLOTS,
            capacity=CAPACITY,
            reach=CAPACITY,
            threads=2,
            drafts=True,
            pictures=LONGEST_STEP,
        )
        return OnnxExecutor(load_onnx(checkpoint, model, options), model.config.vocab_size)
    from models.executors.mlx import load as load_mlx

    policy = "float32" if weights == "float32" else "keep"
    return load_mlx(checkpoint, model, policy=policy, cache_type=cache_type, longest_step=LONGEST_STEP, reach=CAPACITY)


def run(executor: Executor, *rows: Row) -> list[np.ndarray]:
    """One step; each row's logits at all of its places, (L, V)."""
    logits = executor.forward(Step(rows))
    assert logits is not None
    ends = np.cumsum([row.length for row in rows])
    return np.split(np.array(logits.read()), ends[:-1])


def run_in_pieces(
    executor: Executor, slot: int, plan: Planned, tokens: Sequence[int], *ends: int, begin: int = 0
) -> np.ndarray:
    """A row from `begin` on, in several steps that end at these places and at the end. Shapes: (L, V)."""
    bounds = [begin, *(end for end in ends if begin < end < len(tokens)), len(tokens)]
    return np.concatenate([run(executor, plan.row(slot, a, tokens[a:b]))[0] for a, b in pairwise(bounds)])
