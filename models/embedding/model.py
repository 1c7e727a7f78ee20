"""An embedding model as the engine drives it: token ids of texts in, vectors out."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.embedding.head import Head
from models.executors.base import Embedder

Vector: TypeAlias = npt.NDArray[np.float32]
"""An embedding, on the host and of its own. Shapes: (W,)."""


class NotFinite(ArithmeticError):
    """A vector has values that are no numbers, which no client could compare."""


class EmbeddingModel:
    """An embedder with its head. Thread: the executor's, but for what says otherwise."""

    def __init__(self, embedder: Embedder, head: Head) -> None:
        self._embedder = embedder
        self._head = head

    def padded(self, length: int) -> int:
        """See `Embedder.padded`. Thread: any."""
        return self._embedder.padded(length)

    def embed(self, texts: Sequence[Sequence[int]], widths: Sequence[int | None]) -> list[Vector | NotFinite]:
        """The vector of each text, cut to its width; texts are of one padded length. One that is not finite is told so.

        Raises:
            ExecutionError: the device could not.
        """
        hidden = self._embedder.hidden(texts)
        vectors = [self._head.vector(each, width) for each, width in zip(hidden, widths, strict=True)]
        return [
            vector.copy() if np.isfinite(vector).all() else NotFinite("the embedding is not finite numbers")
            for vector in vectors
        ]

    def memory_bytes(self) -> int:
        """See `Embedder.memory_bytes`. Thread: any."""
        return self._embedder.memory_bytes() + self._head.nbytes

    def give_back(self) -> None:
        """See `Embedder.give_back`. Thread: any."""
        self._embedder.give_back()

    def close(self) -> None:
        """Free everything."""
        self._embedder.close()
