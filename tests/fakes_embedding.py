"""An embedding model in miniature."""

from collections.abc import Callable, Sequence

from models.embedding import NotFinite
from tests.fakes import BOS, POISON


class FakeEmbeddingModel:
    """An embedding model of a text's length, its first and its last token; one with POISON in it is not finite.

    `before_pass(number, texts)` is called at the beginning of each pass, in the thread that runs it: it may raise,
    wait, or take notes. Numbers count from 0. Raises if texts of different padded lengths share a pass.
    """

    width = 4

    def __init__(
        self, *, padding: int = 8, before_pass: Callable[[int, Sequence[Sequence[int]]], None] = lambda *_: None
    ) -> None:
        self.passes: list[list[bytes]] = []
        self.closed = False
        self.given_back = 0
        self.before_pass = before_pass
        self._padding = padding

    def padded(self, length: int) -> int:
        return -(-length // self._padding) * self._padding

    def embed(
        self, texts: Sequence[Sequence[int]], widths: Sequence[int | None]
    ) -> list[tuple[float, ...] | NotFinite]:
        assert not self.closed, "a closed model is used"
        assert len({self.padded(len(text)) for text in texts}) == 1, "texts of one pass are padded alike"
        number = len(self.passes)
        self.passes.append([bytes(token for token in text if token < BOS) for text in texts])
        self.before_pass(number, texts)
        return [self._vector(text, width) for text, width in zip(texts, widths, strict=True)]

    def _vector(self, text: Sequence[int], width: int | None) -> tuple[float, ...] | NotFinite:
        if POISON in text:
            return NotFinite("not finite")
        return (float(len(text)), float(text[0]), float(text[-1]), 0.5)[:width]

    def memory_bytes(self) -> int:
        return 123

    def give_back(self) -> None:
        self.given_back += 1

    def close(self) -> None:
        self.closed = True
