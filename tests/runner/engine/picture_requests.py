"""Requests with pictures, and what must be said of them."""

import itertools

import numpy as np
from PIL import Image

from models.vision import PLACE, Prepared, Vision
from models.vision.positions import positions_of
from runner.engine.types import InputImage, TextRequest
from tests.fakes import _AXES, EOS, ByteTokenizer, FakeExecutor, hidden_of
from tests.fakes_vision import SIDE, looked_at
from tests.runner.engine.serving import GREEDY
from tests.runner.engine.test_pictures import saved


def pixels_of(shade: int, rows: int = 2, columns: int = 3) -> np.ndarray:
    return np.full((rows * SIDE, columns * SIDE, 3), shade, np.uint8)


def image(number: int, shade: int, rows: int = 2, columns: int = 3) -> InputImage:
    return InputImage(number, saved(Image.fromarray(pixels_of(shade, rows, columns))))


def asked(prompt: str, *images: InputImage, count: int = 20, **fields) -> TextRequest:
    return TextRequest(prompt, fields.pop("sampling", GREEDY), num_predict=count, images=images, **fields)


def held_of(sees: Vision, row: list[int | Prepared]) -> list[int]:
    """What the executor in miniature holds of a row."""
    held: list[int] = []
    grids: list[tuple[int, tuple[int, int]]] = []
    for piece in row:
        if isinstance(piece, int):
            held.append(piece)
            continue
        rows = iter(looked_at(piece.passes).rows[:, 0].astype(int).tolist())
        own = [next(rows) if token == PLACE else token for token in piece.expansion]
        if sees.longest_run is not None:
            for is_place, run in itertools.groupby(range(len(own)), key=lambda at, m=piece: m.expansion[at] == PLACE):
                places = list(run)
                total = sum(own[place] for place in places) % 9973
                for place in places if is_place else ():
                    own[place] += total
        if piece.grid is not None:
            grids.append((len(held) + piece.expansion.index(PLACE), piece.grid))
        held += own
    positions, _ = positions_of(len(held), grids)
    off = [_AXES * (sum(at) - 3 * place) for place, at in enumerate(positions)]
    return [value + each for value, each in zip(held, off, strict=True)]


def without(row: list[int | Prepared], begin: int, end: int) -> list[int | Prepared]:
    """A row without its tokens [begin, end), and without each picture that has one of them."""
    left, place = [], 0
    for piece in row:
        length = 1 if isinstance(piece, int) else len(piece.expansion)
        if place + length <= begin or place >= end:
            left.append(piece)
        place += length
    return left


def by_heart(sees: Vision, pieces: list[str | np.ndarray], count: int, *, limit: int = 100_000, keep: int = 0) -> str:
    """What greedy decoding must say, by the slowest way: every token from nothing, without a line of the engine's."""
    row: list[int | Prepared] = []
    for piece in pieces:
        row += list(piece.encode()) if isinstance(piece, str) else [sees.prepare(piece)]
    executor, said = FakeExecutor(), bytearray()
    while len(said) < count:
        held = held_of(sees, row)
        token = int(executor.logits_of(hidden_of(held)[-1:]).argmax())
        if token == EOS:
            break
        said.append(token)
        row.append(token)
        if len(held) + 1 >= limit:
            row = without(row, keep, keep + (limit - keep) // 2)
    detokenizer = ByteTokenizer().detokenizer()
    return "".join(detokenizer.push(token) for token in said)


CAT, DOG = image(0, 30), image(1, 90, 3, 4)
PROMPT = "what is [img-0] beside [img-1] then?"
PIECES_OF_PROMPT = ["what is ", pixels_of(30), " beside ", pixels_of(90, 3, 4), " then?"]
