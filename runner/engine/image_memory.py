"""Whether a picture's working space fits into the memory that is left, and which size would.

Owns the arithmetic and the words of a refusal. What a size takes is the pipeline's knowledge, what is free the
system's.
"""

from collections.abc import Callable
from dataclasses import replace

from models.image.base import ImagePipeline, PictureRequest
from runner.engine.memory_limits import in_words
from runner.errors import InsufficientMemory

NEGLIGIBLE_BYTES = 64 << 20
"""What is dared whatever the figures say: systems that compress or swap often call nearly nothing free."""


class ImageMemory:
    """Looks at the memory before a picture is begun. Thread: any."""

    def __init__(
        self, free_bytes: Callable[[], int], *, enforced: bool = True, give_back: Callable[[], None] = lambda: None
    ) -> None:
        """Watch.

        Args:
            free_bytes: What the process may still take, now.
            enforced: False lets everything pass.
            give_back: Gives the system what the process keeps of freed memory; called before a refusal.
        """
        self._free_bytes = free_bytes
        self._enforced = enforced
        self._give_back = give_back

    def check(self, pipeline: ImagePipeline, request: PictureRequest, *, held: int = 0) -> None:
        """Refuse a picture whose working space is not there.

        Args:
            pipeline: What is to make it.
            request: The picture.
            held: Bytes that a picture in the making holds and will have given back by then.

        Raises:
            InsufficientMemory: it is not; the message has the figures and the largest size that fits.
        """
        if not self._enforced:
            return
        needed = pipeline.working_bytes(request)
        if needed <= max(self._free_bytes() + held, NEGLIGIBLE_BYTES):
            return
        self._give_back()
        free = self._free_bytes() + held
        if needed <= free:
            return
        fitting = largest_size(pipeline, request, max(free, NEGLIGIBLE_BYTES))
        remedy = f"the largest size that fits is {fitting[0]}x{fitting[1]}" if fitting else "no size fits"
        raise InsufficientMemory(
            f"insufficient memory: {request.width}x{request.height} needs {in_words(needed)} and {in_words(free)} are "
            f"available; {remedy}, or start the runner with --check-memory=false to try all the same"
        )


def largest_size(pipeline: ImagePipeline, request: PictureRequest, available: int) -> tuple[int, int] | None:
    """The largest width and height of the request's aspect that need no more; None if even the smallest do.

    Both are multiples of `size_multiple`, the shorter side rounded to the nearest.
    """
    multiple = pipeline.abilities.size_multiple
    longer = max(request.width, request.height)

    def size(count: int) -> tuple[int, int]:
        width, height = (max(1, round(side * count / longer)) * multiple for side in (request.width, request.height))
        return width, height

    def fits(count: int) -> bool:
        width, height = size(count)
        return pipeline.working_bytes(replace(request, width=width, height=height)) <= available

    # Bisection: `low` multiples on the longer side fit, `high` do not.
    low, high = 0, longer // multiple + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return size(low) if low else None
