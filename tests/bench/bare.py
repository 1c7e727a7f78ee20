"""The runner's model without the runner: its executor on a CPU, and the least greedy loop over it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.arch import build_model
from models.checkpoint import Checkpoint, open_checkpoint
from models.executors.base import Row, Step
from models.executors.onnx import OnnxExecutor, OnnxOptions, load

CHUNK_TOKENS = 64
"""The runner's default on a CPU."""


def options(*, float32: bool, rows: int, row_tokens: int, threads: int) -> OnnxOptions:
    """As the runner has it by default, or with `--weights=float32 --activations=float32`."""
    return OnnxOptions(
        weights="float32" if float32 else "keep",
        activations="float32" if float32 else "int8",
        slots=rows,
        capacity=row_tokens + CHUNK_TOKENS,
        threads=threads,
    )


class BareRows:
    """Implements `rows.Rows`."""

    def __init__(self, checkpoint: Checkpoint, held: OnnxOptions) -> None:
        model = build_model(checkpoint.config)
        loaded = load(checkpoint, model, held)
        self.weight_bytes = loaded.weight_bytes
        self.table_bytes = sum(table.nbytes for table in loaded.tables.values())
        self.executor = OnnxExecutor(loaded, model.config.vocab_size)

    @classmethod
    def open(cls, model: Path, *, float32: bool, rows: int, row_tokens: int, threads: int) -> "BareRows":
        held = options(float32=float32, rows=rows, row_tokens=row_tokens, threads=threads)
        return cls(open_checkpoint(str(model), Path()), held)

    def prefill(self, row: int, begin: int, ids: Sequence[int]) -> int:
        return int(self._chunks(row, begin, ids, wants_all=False)[-1][-1].argmax())

    def step(self, places: Sequence[tuple[int, int, int]]) -> list[int]:
        return self.logits(places).argmax(axis=-1).tolist()

    def logits(self, places: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.float32]:
        """Logits of a step. Shapes: (rows, V)."""
        logits = self.executor.forward(Step(tuple(Row(row, begin, (token,)) for row, begin, token in places)))
        assert logits is not None
        return logits.read()

    def rewind(self, row: int, begin: int) -> None:
        """Nothing is to be done: a step says how many tokens count."""

    def all_logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits at each place of a text of its own. Shapes: (T, V)."""
        return np.concatenate(self._chunks(0, 0, ids, wants_all=True))

    def _chunks(self, row: int, begin: int, ids: Sequence[int], *, wants_all: bool) -> list[npt.NDArray[np.float32]]:
        made = []
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = tuple(ids[start : start + CHUNK_TOKENS])
            is_last = start + CHUNK_TOKENS >= len(ids)
            wanted = len(chunk) if wants_all else int(is_last)
            logits = self.executor.forward(Step((Row(row, begin + start, chunk, wanted),)))
            if logits is not None:
                made.append(logits.read())
        return made
