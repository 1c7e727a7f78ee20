"""The executors as the parity tests drive them: a checkpoint loaded, rows run, whole logits read."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from models.checkpoint import open_checkpoint
from models.executors.base import Executor, Row, Step
from models.weights.matching import model_of

HERE = Path(__file__).parent
EXECUTORS = ("onnx", "mlx")
SLOTS = 17
CAPACITY = 512
REACH = 128


def load(path: Path, kind: str, *, weights: str = "float32", cache_type: str = "f16", slots: int = SLOTS) -> Executor:
    """A checkpoint on an executor of that kind."""
    checkpoint = open_checkpoint(str(path), HERE / "no-store")
    model = model_of(checkpoint)
    if kind == "onnx":
        from models.executors.onnx import OnnxExecutor, OnnxOptions
        from models.executors.onnx import load as load_onnx

        options = OnnxOptions(
            weights=weights, cache_type=cache_type, slots=slots, capacity=CAPACITY, reach=REACH, threads=2, drafts=True
        )
        return OnnxExecutor(load_onnx(checkpoint, model, options), model.config.vocab_size)
    from models.executors.mlx import load as load_mlx

    policy = "float32" if weights == "float32" else "keep"
    return load_mlx(checkpoint, model, policy=policy, cache_type=cache_type, longest_step=64, reach=REACH)


def run(executor: Executor, *rows: tuple[int, int, Sequence[int]]) -> list[np.ndarray]:
    """One step of rows (slot, begin, tokens); each row's logits at all of its places, (L, V)."""
    step = Step(tuple(Row(slot, begin, tuple(tokens), len(tokens)) for slot, begin, tokens in rows))
    logits = executor.forward(step)
    assert logits is not None
    values = np.array(logits.read())
    ends = np.cumsum([len(tokens) for _, _, tokens in rows])
    return np.split(values, ends[:-1])


def run_in_pieces(executor: Executor, slot: int, tokens: Sequence[int], *ends: int, begin: int = 0) -> np.ndarray:
    """A row from `begin` on, in several steps that end before the given positions and at the end. Shapes: (L, V)."""
    bounds = [begin, *(end for end in ends if end > begin), len(tokens)]
    return np.concatenate([run(executor, (slot, a, tokens[a:b]))[0] for a, b in pairwise(bounds) if a < b])
