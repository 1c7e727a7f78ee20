"""Matrix products on the host, by the BLAS that `models.image.blas` put into this process, and threads to share them.

For work that is better done on numpy arrays than in MLX's graph. A product here runs in one thread; whoever has many
gives them to a `Crew`: ctypes and numpy let go of the interpreter while they compute, and threads that never wait for
each other within a product lose less to a busy neighbour than the BLAS's own.
"""

import ctypes
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from types import TracebackType
from typing import Final, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Matrix: TypeAlias = npt.NDArray[np.float32]
T = TypeVar("T")

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112
"""CBLAS's constants."""

THREAD_FUNCTIONS = (
    ("MKL_Set_Num_Threads", "MKL_Get_Max_Threads"),
    ("openblas_set_num_threads", "openblas_get_num_threads"),
)
"""How a BLAS is told its number of threads, and asked for it."""
SHARES = min(16, max(2, os.cpu_count() or 2))
"""For how many workers work is cut up, however many there are: where a product is cut decides how it rounds, and a
picture shall have the same bytes in every process of a machine, whatever else went on when it was loaded."""


class Gemm:
    """`cblas_sgemm` of one library."""

    def __init__(self, library: ctypes.CDLL, setter: str, getter: str) -> None:
        self._set_threads, self._get_threads = library[setter], library[getter]
        self._sgemm: Final = library["cblas_sgemm"]
        c_int, c_float, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        self._sgemm.argtypes = [c_int] * 6 + [c_float, pointer, c_int, pointer, c_int, c_float, pointer, c_int]
        self._sgemm.restype = None

    @property
    def threads(self) -> int:
        """How many the BLAS may use now."""
        return int(self._get_threads())

    def set_threads(self, threads: int) -> None:
        """For products that begin from now on."""
        self._set_threads(threads)

    def multiply(
        self, a: Matrix, b: Matrix, out: Matrix, *, accumulate: bool = False, transpose_b: bool = False
    ) -> None:
        """Out = a @ b, or out += a @ b. Thread: any.

        Shapes: a (M, K), b (K, N) or transposed (N, K), out (M, N); rows may lie apart, the elements of one may not.
        """
        rows, inner = a.shape
        columns = out.shape[1]
        assert b.shape == ((columns, inner) if transpose_b else (inner, columns))
        assert out.shape[0] == rows
        self._sgemm(
            *(ROW_MAJOR, PLAIN, TRANSPOSED if transpose_b else PLAIN, rows, columns, inner),
            *(1.0, a.ctypes.data, a.strides[0] >> 2, b.ctypes.data, b.strides[0] >> 2),
            *(1.0 if accumulate else 0.0, out.ctypes.data, out.strides[0] >> 2),
        )

    def multiply_stacks(self, a: Matrix, b: Matrix, out: Matrix) -> None:
        """out[i] = a[i] @ b[i] for all i. Thread: any. Shapes: (P, M, K), (P, K, N), (P, M, N), contiguous."""
        planes, rows, inner = a.shape
        columns = b.shape[2]
        assert b.shape == (planes, inner, columns)
        assert out.shape == (planes, rows, columns)
        at_a, at_b, at_out = a.ctypes.data, b.ctypes.data, out.ctypes.data
        for plane in range(planes):
            self._sgemm(
                *(ROW_MAJOR, PLAIN, PLAIN, rows, columns, inner, 1.0, at_a + plane * a.strides[0], inner),
                *(at_b + plane * b.strides[0], columns, 0.0, at_out + plane * out.strides[0], columns),
            )


def host_gemm() -> Gemm | None:
    """The fast BLAS of this process, or None where `models.image.blas.prepare` loaded none. Thread: any."""
    library = ctypes.CDLL(None)
    for setter, getter in THREAD_FUNCTIONS:
        if all(hasattr(library, name) for name in ("cblas_sgemm", setter, getter)):
            return Gemm(library, setter, getter)
    return None


class Crew:
    """As many threads as the BLAS has, each with a BLAS of one thread; a context. Thread: whoever entered it."""

    def __init__(self, gemm: Gemm) -> None:
        self.gemm = gemm
        self.size = max(1, gemm.threads)

    def __enter__(self) -> Self:
        self.gemm.set_threads(1)
        self._others = ThreadPoolExecutor(self.size - 1, "crew") if self.size > 1 else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._others is not None:
            self._others.shutdown()
        self.gemm.set_threads(self.size)

    def share(self, work: Callable[[int, T], None], items: Iterable[T]) -> None:
        """Call work(worker, item) for all items, each worker taking the next when it is done with one; wait.

        `worker` is 0 to size - 1. Raises what `work` raises.
        """
        queue = iter(list(items))

        def drain(worker: int) -> None:
            # A list's iterator hands out each item once, whichever thread asks: `next` holds the interpreter.
            for item in queue:
                work(worker, item)

        others = self._others
        waiting = [] if others is None else [others.submit(drain, worker) for worker in range(1, self.size)]
        try:
            drain(0)
        finally:
            for future in waiting:
                future.result()


def chunks(total: int, size: int) -> list[slice]:
    """0 to total in slices of about equal length, none longer than size."""
    count = max(1, -(-total // size))
    bounds = [total * n // count for n in range(count + 1)]
    return [slice(low, high) for low, high in zip(bounds, chain(bounds[1:]), strict=False)]
