"""Steps of a diffusion transformer that are guessed instead of computed.

Between neighbouring steps the blocks add nearly the same to a sequence. So the relative change of what the first block
sees is summed up from step to step, and while the sum is below a threshold, what the blocks added last is added again.

Source: TeaCache (arXiv 2411.19108), with the input of the first block as the indicator and no fitted polynomial.
"""

import mlx.core as mx

from models.host import to_floats


class StepCache:
    """The memory of one run with one conditioning. Thread: the MLX thread.

    The first step and the last are always computed: the one has nothing before it, the other nothing to mend it.
    """

    def __init__(self, threshold: float, steps: int) -> None:
        """Args: threshold: relative change that may add up before a step is computed; steps: how many will be asked."""
        self._threshold = threshold
        self._last = steps - 1
        self._step = -1
        self._change = 0.0
        self._indicator: mx.array | None = None
        self._residual: mx.array | None = None
        self.computed = 0

    def lookup(self, indicator: mx.array) -> mx.array | None:
        """Begin the next step: what to add instead of computing, or None if it is to be computed and then kept.

        Args:
            indicator: what the first block sees, of one shape and in float32 from step to step; it is kept.
        """
        self._step += 1
        before, self._indicator = self._indicator, indicator
        if self._residual is None or before is None or self._step >= self._last:
            return None
        ratio = mx.mean(mx.abs(indicator - before)) / mx.mean(mx.abs(before))
        self._change += to_floats(ratio[None])[0]
        return self._residual if self._change < self._threshold else None

    def keep(self, residual: mx.array) -> None:
        """Remember what the blocks added in this step, which was computed."""
        self.computed += 1
        self._change = 0.0
        self._residual = residual
