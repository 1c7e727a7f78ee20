"""The BLAS under pictures on a CPU: a fast one in the place of MLX's own, and its threads.

`prepare` must run before `mlx.core` is imported: the Linux CPU wheel of MLX carries the reference BLAS, about 90 times
slower than the processor. Its `cblas_sgemm` is looked up when the library is loaded, so a better BLAS that is
already in the process, with its symbols global, takes its place. Nothing here changes what Metal or CUDA do.
"""

import ctypes
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from models.device import has_cuda_package, usable_cores
from models.process_memory import keep_freed

BLAS_LIBRARIES = (
    ("mkl", "libmkl_rt.so", "MKL_Set_Num_Threads"),
    ("cmeel-openblas", "libopenblas.so", "openblas_set_num_threads"),
)
"""Distribution, library, and its function that sets the number of threads; the first that is installed is taken."""

THREAD_VARIABLES = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


class Blas:
    """The BLAS of this process, and its threads.

    Their number is fixed once a model is loaded, for it decides how sums are split, hence the last bits of a result.
    Two threads on two idle cores are 1.4 times faster than one, but lose by half when another process works on one
    of them, because each product waits for its slowest part. So, unless told otherwise, there are as many threads as
    cores were idle while the model was loading.
    """

    def __init__(self, name: str, set_threads: Callable[[int], None], threads: int | None) -> None:
        self.name = name
        self._set = set_threads
        self._asked = threads or _threads_of_environment()
        self._began = _CpuTimes.now()
        self.threads = self._asked or usable_cores()
        self._set_threads()

    def settle(self) -> int:
        """Set the threads to what the machine has left; the number. Thread: the executor's thread."""
        if self._asked is None:
            busy = _CpuTimes.now().others_busy_since(self._began)
            self.threads = max(1, usable_cores() - round(busy))
            self._set_threads()
        return self.threads

    def _set_threads(self) -> None:
        self._set(self.threads)


@dataclass(frozen=True, slots=True)
class BlasReport:
    """What `prepare` did: a line for the log, and a line with the remedy where something is missing."""

    summary: str
    warning: str | None = None
    blas: Blas | None = None


@cache
def prepare(threads: int | None = None) -> BlasReport:
    """Put a fast BLAS under MLX's CPU backend, once in a process. Thread: any, before mlx.core is imported.

    Args:
        threads: BLAS threads; None takes MKL_NUM_THREADS, OPENBLAS_NUM_THREADS or OMP_NUM_THREADS, else idle cores.
    """
    if sys.platform != "linux" or has_cuda_package():
        return BlasReport("MLX's own kernels")
    if "mlx.core" in sys.modules:
        return BlasReport("reference BLAS", "mlx was imported before a fast BLAS: pictures on a CPU are slow")
    keep_freed()
    # The same product has the same bits wherever its operands lie in memory; costs nothing (measured on AVX-512).
    os.environ.setdefault("MKL_CBWR", "AUTO")
    for distribution, stem, setter in BLAS_LIBRARIES:
        path = _library(distribution, stem)
        if path is None:
            continue
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
        except OSError as error:
            return BlasReport("reference BLAS", f"{distribution} cannot be loaded, pictures on a CPU are slow: {error}")
        name = f"{distribution} {importlib.metadata.version(distribution)}"
        return BlasReport(name, blas=Blas(name, library[setter], threads))
    remedy = "mkl" if platform.machine() == "x86_64" else "cmeel-openblas"
    return BlasReport(
        "reference BLAS",
        f"no fast BLAS found, pictures on a CPU are about 90 times slower; remedy: pip install {remedy}",
    )


def _threads_of_environment() -> int | None:
    for variable in THREAD_VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None


def _library(distribution: str, stem: str) -> Path | None:
    """The shared library of an installed distribution, by its own list of files."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = sorted(Path(str(file.locate())).resolve() for file in files if file.name.startswith(stem))
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class _CpuTimes:
    """Seconds of processor time that all processes and that this one have used, at a moment."""

    moment: float
    everyone: float
    own: float

    @classmethod
    def now(cls) -> "_CpuTimes":
        times = psutil.cpu_times()
        return cls(time.monotonic(), times.user + times.system + times.nice, time.process_time())

    def others_busy_since(self, earlier: "_CpuTimes") -> float:
        """Cores that other processes kept busy since then; 0 where too little time has passed to say."""
        elapsed = self.moment - earlier.moment
        if elapsed < 0.2:
            return 0.0
        return max(0.0, (self.everyone - earlier.everyone - (self.own - earlier.own)) / elapsed)
