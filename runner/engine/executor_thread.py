"""ExecutorThread: the one thread in which a model's arrays are used."""

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

THREAD_NAME = "executor"


class ExecutorThread:
    """A single worker; MLX's streams are bound to the thread that made them.

    What was handed in runs to its end, in order, even when the caller is cancelled meanwhile; only the answer is lost.
    """

    def __init__(self) -> None:
        # The worker is called executor_0.
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
        self._closing: asyncio.Future[None] | None = None

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` in the thread; its exception is raised here.

        Raises:
            RuntimeError: the thread is closed.
        """
        if self._pool is None:
            raise RuntimeError("the executor's thread is closed")
        # Without the shield a cancelled caller would take back work that has not begun, such as freeing an engine.
        return await asyncio.shield(asyncio.wrap_future(self._pool.submit(function, *args, **kwargs)))

    async def close(self) -> None:
        """Give up MLX's streams, if it was used, as the last thing there, and end the thread. Idempotent."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            self._closing = asyncio.wrap_future(pool.submit(_clear_streams))
            # Queued work still runs; the worker ends after it.
            pool.shutdown(wait=False)
        if self._closing is not None:
            await asyncio.shield(self._closing)


def _clear_streams() -> None:
    """A thread that leaves its streams behind may crash the process at exit (ml-explore/mlx 3395, 4110; as of 0.32)."""
    if "mlx.core" in sys.modules:
        import mlx.core as mx  # noqa: PLC0415 - only where it was used

        mx.synchronize()
        mx.clear_streams()
