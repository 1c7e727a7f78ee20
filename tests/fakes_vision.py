"""A sense of sight in miniature: exact, and so slow or bad as a test asks for.

A picture has a place for each square of SIDE pixels a side; what the tower says of a place is a whole number made of
the whole picture and the place, by which tests/fakes.py's executor goes on.
"""

from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np

from models.errors import ExecutionError
from models.executors.base import EncodedPicture
from models.vision import PLACE, PictureError, Pixels, Prepared, Tower, Vision
from tests.fakes import FIRST_LOOK

SIDE = 8
FILLER = ord("#")
BEGIN, END = ord("<"), ord(">")
BREAK = ord("|")
WIDTH = 4
PIECES = 3
"""After so many pieces of work the tower has looked at a picture."""
PASS_BYTES = 1000


def vision(
    *, two_way: bool = False, axes: bool = False, breaks: bool = False, deep: int = 0, around: bool = True
) -> Vision:
    """How the miniature sees.

    Args:
        two_way: places of a picture look at each other.
        axes: positions have axes.
        breaks: rows of places are divided by a token.
        deep: how many layers get something besides.
        around: a picture stands between two tokens.
    """

    def prepare(pixels: Pixels) -> Prepared:
        height, width = pixels.shape[:2]
        if max(height, width) > 100 * min(height, width):
            raise PictureError(f"is {width}x{height} pixels, which is too narrow")
        rows, columns = -(-height // SIDE), -(-width // SIDE)
        places = [PLACE] * (rows * columns)
        if breaks:
            places = [token for _ in range(rows) for token in (*[PLACE] * columns, BREAK)][:-1]
        given = {"pixels": pixels.astype(np.float32), "places": np.arange(rows * columns)}
        expansion = (BEGIN, *places, END) if around else tuple(places)
        return Prepared((given,), rows * columns, expansion, (rows, columns) if axes else None)

    tower = Tower(
        weights=None,
        forward=lambda ops: (),
        width=WIDTH,
        num_layers=1,
        prefixes=("vision_tower.",),
        working_bytes=lambda patches: PASS_BYTES * patches,
        deep=deep,
    )
    return Vision(tower, prepare, FILLER, longest_run=4096 if two_way else None)


def looked_at(passes: Sequence[Mapping[str, np.ndarray]], deep: int = 0) -> EncodedPicture:
    """What the tower makes of a picture."""
    (given,) = passes
    digest = int(given["pixels"].astype(np.int64).ravel() @ (np.arange(given["pixels"].size) % 97 + 1)) % 9973
    rows = np.zeros((len(given["places"]), WIDTH), np.float32)
    rows[:, 0] = FIRST_LOOK + digest + 7 * given["places"]
    return EncodedPicture(rows, tuple(rows + layer for layer in range(deep)))


class FakeEncoder:
    """A PictureEncoder. `before_piece(picture, piece)` is called at the beginning of each; it may raise or wait."""

    def __init__(self, *, deep: int = 0, before_piece: Callable[[int, int], None] = lambda *_: None) -> None:
        self.begun = 0
        self.given_up = 0
        self.finished = 0
        self.closed = False
        self.before_piece = before_piece
        self._deep = deep

    def encode(self, passes: Sequence[Mapping[str, np.ndarray]]) -> Generator[None, None, EncodedPicture]:
        assert not self.closed, "a closed encoder is used"
        number, self.begun = self.begun, self.begun + 1
        try:
            for piece in range(PIECES):
                self.before_piece(number, piece)
                if piece < PIECES - 1:
                    yield
        except GeneratorExit:
            self.given_up += 1
            raise
        self.finished += 1
        return looked_at(passes, self._deep)

    def memory_bytes(self) -> int:
        return 77

    def close(self) -> None:
        self.closed = True


def failing(picture: int) -> Callable[[int, int], None]:
    """A `before_piece` at which one picture fails half-way."""

    def before_piece(number: int, piece: int) -> None:
        if number == picture and piece == 1:
            raise ExecutionError("the tower fell")

    return before_piece
