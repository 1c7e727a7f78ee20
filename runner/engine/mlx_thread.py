"""MLXThread: the one thread in which MLX is used."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

THREAD_NAME = "mlx"


class MLXThread:
    """A single-worker executor; MLX streams are bound to the thread that made them.

    What was handed in runs to its end, in order, even when the caller is cancelled meanwhile; only the answer is lost.
    """

    def __init__(self) -> None:
        # The worker is called mlx_0.
        self._executor: ThreadPoolExecutor | None = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
        self._closing: asyncio.Future[None] | None = None

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` in the MLX thread; its exception is raised here.

        Raises:
            RuntimeError: the thread is closed.
        """
        if self._executor is None:
            raise RuntimeError("the MLX thread is closed")
        # Without the shield a cancelled caller would take back work that has not begun, such as freeing an engine.
        return await asyncio.shield(asyncio.wrap_future(self._executor.submit(function, *args, **kwargs)))

    async def close(self) -> None:
        """Run `mx.clear_streams()` there as the last thing and end the thread. Idempotent."""
        if self._executor is not None:
            executor, self._executor = self._executor, None
            self._closing = asyncio.wrap_future(executor.submit(_clear_streams))
            # Queued work still runs; the worker ends after it.
            executor.shutdown(wait=False)
        if self._closing is not None:
            await asyncio.shield(self._closing)


def _clear_streams() -> None:
    """A thread that leaves its streams behind may crash the process at exit (ml-explore/mlx 3395, 4110; as of 0.32)."""
    import mlx.core as mx  # noqa: PLC0415 - the BLAS is chosen before MLX is first imported; this module may be earlier

    mx.synchronize()
    mx.clear_streams()
