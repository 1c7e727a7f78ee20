"""Whole texts to hidden states on ONNX Runtime: encoders in a stateless pass, decoders through an executor's slots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from models.arch import Model
from models.checkpoint import Checkpoint
from models.executors.base import Embedder, Row
from models.executors.onnx.bidirectional import PADDED, UNPADDED, VISIBLE
from models.executors.onnx.executor import Array, Loaded, OnnxExecutor
from models.executors.onnx.loading import OnnxOptions, load
from models.executors.onnx.steps import Run
from models.process_memory import trim

Floats = npt.NDArray[np.float32]

_PADDING = 8


class OnnxEncoderEmbedder:
    """Implements `Embedder` for a model whose tokens see the whole text. Thread: the executor's."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded: Loaded | None = loaded
        self._added: tuple[int, dict[str, Array]] = (0, {})

    def padded(self, length: int) -> int:
        """See `Embedder.padded`. Thread: any."""
        return length if length > PADDED else -(-length // _PADDING) * _PADDING

    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Floats]:
        """See `Embedder.hidden`."""
        loaded = self._loaded
        assert loaded is not None
        count, longest = len(texts), max(self.padded(len(text)) for text in texts)
        ids = np.zeros((count, longest), np.int64)
        visible = np.zeros((count, longest), np.int32)
        for place, text in enumerate(texts):
            ids[place, : len(text)] = text
            visible[place, : len(text)] = 1
        inputs: dict[str, Array] = {VISIBLE: visible, UNPADDED: np.array(longest > PADDED)}
        places = np.tile(np.arange(longest), count)
        for name, lookup in loaded.lookups.items():
            rows = loaded.tables[name].rows(lookup.rows_of(ids.reshape(-1), places))
            inputs[name] = rows.reshape(count, longest, -1)
        inputs |= self._scores(longest)
        for index, rope in enumerate(loaded.ropes):
            rope.reach(longest)
            inputs |= {f"cos.{index}": rope.cos, f"sin.{index}": rope.sin}
        made = {name: np.empty((count, longest, width), np.float32) for name, width in loaded.outputs.items()}
        loaded.sessions.run((0, 0), {}, inputs, made)
        (hidden,) = made.values()
        return [row[: len(text)] for row, text in zip(hidden, texts, strict=True)]

    def _scores(self, length: int) -> Mapping[str, Array]:
        """What is added to the scores, kept for texts of the same length. Shapes: (1, 1 or H, S, S) each."""
        loaded = self._loaded
        assert loaded is not None
        if self._added[0] != length:
            made = {}
            for name, (window, bias) in loaded.scores.items():
                values = np.zeros((1, 1, length, length), np.float32)
                if bias is not None:
                    table = loaded.bias_tables[bias.table.name]
                    values = np.ascontiguousarray(table.T[:, bias.buckets(length)][None])
                if window is not None:
                    places = np.arange(length)
                    values[..., np.abs(places[:, None] - places) >= window] = -np.inf
                made[name] = values
            self._added = (length, made)
        return self._added[1]

    def memory_bytes(self) -> int:
        """See `Embedder.memory_bytes`."""
        return 0 if self._loaded is None else self._loaded.weight_bytes

    def give_back(self) -> None:
        """See `Embedder.give_back`."""
        trim()

    def close(self) -> None:
        """See `Embedder.close`."""
        self._loaded = None
        self._added = (0, {})
        trim()


class OnnxDecoderEmbedder:
    """Implements `Embedder` for a model whose tokens see those before them. Thread: the executor's."""

    def __init__(self, loaded: Loaded, slots: int) -> None:
        self._executor = OnnxExecutor(loaded, 0)
        self._slots = slots

    def padded(self, length: int) -> int:
        """See `Embedder.padded`. Thread: any."""
        return length if length > PADDED else -(-length // _PADDING) * _PADDING

    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Floats]:
        """See `Embedder.hidden`."""
        found: list[Floats] = []
        for begin in range(0, len(texts), self._slots):
            some = texts[begin : begin + self._slots]
            run = Run(tuple(Row(slot, 0, tuple(text), len(text)) for slot, text in enumerate(some)))
            (made,) = self._executor.run(run).values()
            for slot in range(len(some)):
                self._executor.release(slot)
            ends = np.cumsum([len(text) for text in some])
            found += np.split(made[: ends[-1]], ends[:-1])
        return found

    def memory_bytes(self) -> int:
        """See `Embedder.memory_bytes`."""
        return self._executor.memory_bytes()

    def give_back(self) -> None:
        """See `Embedder.give_back`."""
        self._executor.give_back()

    def close(self) -> None:
        """See `Embedder.close`."""
        self._executor.close()


def load_embedder(
    checkpoint: Checkpoint, model: Model, options: OnnxOptions, *, progress: Callable[[float], None] = lambda _: None
) -> Embedder:
    """Load a model for its hidden states. Thread: the executor's. Raises as `load` does."""
    loaded = load(checkpoint, model, replace(options, hidden=True), progress=progress)
    if model.is_encoder:
        return OnnxEncoderEmbedder(loaded)
    return OnnxDecoderEmbedder(loaded, options.slots)
