"""Memory that exists where it was written: slabs of a model's whole context for every slot, and tables of rotations."""

import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.ops import RopeConfig

_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40
"""MAP_NORESERVE, which Python 3.11 does not name. Source: Linux's and Darwin's mman.h."""
_PAGE = mmap.PAGESIZE


class VirtualArray:
    """Zeros that take memory only where they are written. Thread: the executor's."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Reserve addresses.

        Raises:
            MemoryError: the system gives no addresses of that size.
        """
        nbytes = max(math.prod(shape) * dtype.itemsize, 1)
        try:
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        except OSError as error:
            raise MemoryError(f"the system gives no address space of {nbytes >> 20} MiB: {error.strerror}") from error
        if sys.platform == "linux":
            # A huge page a head and slot would hold what nobody wrote.
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: npt.NDArray[Any] = np.frombuffer(self._map, dtype, math.prod(shape)).reshape(shape)

    def forget(self, index: int) -> None:
        """Give back the memory of one entry of the first axis, as far as it has whole pages: zeros then."""
        size = self.array[index].nbytes
        begin = -(-index * size // _PAGE) * _PAGE
        end = (index + 1) * size // _PAGE * _PAGE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Rotations:
    """The cosines and sines of one rope, filled as far as rows reach. Shapes: both (spare + positions, dims / 2).

    The first `spare` are for positions with several axes, those of a step.
    """

    def __init__(self, rope: RopeConfig, positions: int, reach: int = 0, spare: int = 0) -> None:
        """Reserve tables for so many positions; rows may have `reach` tokens."""
        self._frequencies = rope.frequencies(reach)
        self._magnitude = rope.magnitude
        self._axes = list(rope.axes)
        self._spare = spare
        shape, self._filled = (spare + positions, len(self._frequencies)), 0
        self._tables = [VirtualArray(shape, np.dtype(np.float32)) for _ in range(2)]

    @property
    def cos(self) -> npt.NDArray[np.float32]:
        """The cosines."""
        return self._tables[0].array

    @property
    def sin(self) -> npt.NDArray[np.float32]:
        """The sines."""
        return self._tables[1].array

    def reach(self, position: int) -> None:
        """Have the tables filled up to a position."""
        if position <= self._filled:
            return
        begin, end = self._filled, min(max(position, 2 * self._filled, 256), len(self.cos) - self._spare)
        self._write(self._spare + begin, np.arange(begin, end, dtype=np.float32)[:, None])
        self._filled = end

    def put(self, positions: Sequence[tuple[int, int, int]]) -> None:
        """Have the spare ones hold these, in order."""
        if positions:
            along = np.array(positions, np.float32)
            self._write(0, along[:, self._axes] if self._axes else along[:, :1])

    def _write(self, begin: int, positions: npt.NDArray[np.float32]) -> None:
        """Shapes: positions (N, 1 or dims / 2)."""
        angles = positions * self._frequencies
        self.cos[begin : begin + len(angles)] = np.cos(angles) * self._magnitude
        self.sin[begin : begin + len(angles)] = np.sin(angles) * self._magnitude
