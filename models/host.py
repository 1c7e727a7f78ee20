"""The only reads from the device to the host, so that every point where the host waits can be grepped."""

from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

HostArray: TypeAlias = npt.NDArray[Any]


def to_ints(array: mx.array) -> list[int]:
    """Wait for a one-dimensional integer array and read it."""
    return cast("list[int]", array.tolist())


def to_floats(array: mx.array) -> list[float]:
    """Wait for a one-dimensional float array and read it."""
    return cast("list[float]", array.tolist())


def wait(arrays: list[mx.array]) -> None:
    """Wait until the arrays are computed, reading nothing."""
    mx.eval(arrays)


def to_bytes(array: mx.array) -> bytes:
    """Wait for a contiguous array of any type and copy its bytes, in the machine's order."""
    return bytes(memoryview(array.view(mx.uint8)))  # type: ignore[arg-type]  # the buffer protocol, undeclared


def to_uint8(array: mx.array) -> npt.NDArray[np.uint8]:
    """Wait for a uint8 array and copy it."""
    return np.array(array)


def lend(array: mx.array) -> HostArray:
    """Wait for an array of a type that numpy knows and lend its memory to numpy, which may write it. CPU only.

    For arrays that nothing else holds: whoever shares the buffer sees the change.
    """
    mx.eval(array)
    return np.array(array, copy=False)
