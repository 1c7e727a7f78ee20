"""MLXThread: the one thread in which MLX is used."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class MLXThread:
    """A single-worker executor; MLX streams are bound to the thread that made them."""

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` in the MLX thread; its exception is raised here."""
        raise NotImplementedError

    async def close(self) -> None:
        """Run `mx.clear_streams()` there as the last thing and end the thread. Idempotent."""
        raise NotImplementedError
