"""What MLX is told about memory, and what it is asked to give back. Imports MLX."""

import mlx.core as mx

from models.device import device
from models.process_memory import trim


def configure() -> None:
    """Set the limits that this device wants. Thread: the executor's, before a model is loaded.

    On Metal the model's memory is wired, so that macOS does not page it out between requests, and the buffer cache is
    kept to an eighth of the working set. Elsewhere MLX's defaults hold.
    """
    here = device()
    if here.kind == "metal":
        mx.set_wired_limit(here.total_bytes)
        mx.set_cache_limit(here.total_bytes // 8)


def give_back() -> None:
    """Return to the system what MLX and the C library keep of freed memory. Thread: any."""
    mx.clear_cache()
    trim()
