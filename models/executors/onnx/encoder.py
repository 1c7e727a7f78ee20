"""A language model as a text encoder, on ONNX Runtime: what its layers make of a text."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.executors.base import Row
from models.executors.onnx.executor import Loaded, OnnxExecutor
from models.executors.onnx.steps import ROUNDING, Run


class OnnxEncoder:
    """Implements `Encoder`. Thread: the executor's."""

    def __init__(self, loaded: Loaded, taps: Sequence[int]) -> None:
        """Run a graph whose outputs are what the first so many layers make, for each number in `taps`."""
        self._executor = OnnxExecutor(loaded, 0)
        self._outputs = dict(zip(taps, loaded.outputs, strict=True))

    def residuals(
        self, tokens: Sequence[int], layers: Sequence[int], *, visible: int | None = None
    ) -> npt.NDArray[np.float32]:
        """See `Encoder.residuals`."""
        count = len(tokens)
        run = Run((Row(0, 0, tuple(tokens), count),))
        bound = -(-run.reach // ROUNDING) * ROUNDING
        bias = np.zeros((1, 1, run.longest, bound), np.float32)
        if visible is not None:
            bias[..., visible:] = -np.inf
        made = self._executor.run(run, bias=bias)
        self._executor.release(0)
        # A step may have run the last token twice.
        return np.stack([made[self._outputs[layer]][:count] for layer in layers])

    def close(self) -> None:
        """Free everything; the encoder is of no use afterwards."""
        self._executor.close()
