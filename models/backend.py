"""The device: what this machine computes on, and what makes MLX fast there.

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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's mallopt parameters (malloc.h)."""

KEPT_BYTES = 1 << 30
"""Freed memory up to this much stays with the process: MLX's CPU backend allocates afresh for every array."""

BLAS_LIBRARIES = (
    ("mkl", "libmkl_rt.so", "MKL_Set_Num_Threads"),
    ("cmeel-openblas", "libopenblas.so", "openblas_set_num_threads"),
)
"""Distribution, library, and its function that sets the number of threads; the first that is installed is taken."""

FEW_ROWS_DISTRIBUTION, FEW_ROWS_PREFIX = "scipy-openblas32", "scipy_"
FEW_ROWS_CORES = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})
"""OpenBLAS's names of the processors for which it has kernels that multiply small matrices without packing them."""

THREAD_VARIABLES = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Device:
    """What MLX computes on. Sizes in bytes."""

    kind: Literal["cpu", "metal", "cuda"]
    name: str
    total_bytes: int
    available_bytes: int


class Blas:
    """The BLAS of this process, one or two libraries, and their threads.

    Their number is fixed once a model is loaded, for it decides how sums are split, hence the last bits of a result.
    Two threads on two idle cores decode 1.4 times faster than one, but lose by half when another process works on one
    of them, because each product waits for its slowest part. So, unless told otherwise, there are as many threads as
    cores were idle while the model was loading.
    """

    def __init__(self, name: str, setters: Sequence[Callable[[int], None]], threads: int | None) -> None:
        self.name = name
        self._setters = setters
        self._asked = threads or _threads_of_environment()
        self._began = _CpuTimes.now()
        self.threads = self._asked or usable_cores()
        self._set_threads()

    def settle(self) -> int:
        """Set the threads to what the machine has left; the number. Thread: the MLX thread."""
        if self._asked is None:
            busy = _CpuTimes.now().others_busy_since(self._began)
            self.threads = max(1, usable_cores() - round(busy))
            self._set_threads()
        return self.threads

    def _set_threads(self) -> None:
        for setter in self._setters:
            setter(self.threads)


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What `prepare` did: a line for the log, and a line with the remedy where something is missing."""

    summary: str
    warning: str | None = None
    blas: Blas | None = None


@cache
def prepare(threads: int | None = None) -> BackendReport:
    """Put a fast BLAS under MLX's CPU backend, once in a process. Thread: any, before mlx.core is imported.

    Args:
        threads: BLAS threads; None takes MKL_NUM_THREADS, OPENBLAS_NUM_THREADS or OMP_NUM_THREADS, else idle cores.
    """
    if sys.platform != "linux" or _has_cuda():
        return BackendReport("MLX's own kernels")
    if "mlx.core" in sys.modules:
        return BackendReport("reference BLAS", "mlx was imported before a fast BLAS: CPU inference is slow")
    _keep_freed_memory()
    # The same product has the same bits wherever its operands lie in memory; costs nothing (measured on AVX-512).
    os.environ.setdefault("MKL_CBWR", "AUTO")
    for distribution, stem, setter in BLAS_LIBRARIES:
        path = _library(distribution, stem)
        if path is None:
            continue
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
        except OSError as error:
            return BackendReport("reference BLAS", f"{distribution} cannot be loaded, CPU inference is slow: {error}")
        name, setters = f"{distribution} {importlib.metadata.version(distribution)}", [library[setter]]
        if (few_rows := few_rows_library()) is not None:
            name += f", {FEW_ROWS_DISTRIBUTION} {importlib.metadata.version(FEW_ROWS_DISTRIBUTION)}"
            setters.append(few_rows[f"{FEW_ROWS_PREFIX}openblas_set_num_threads"])
        return BackendReport(name, blas=Blas(name, setters, threads))
    remedy = "mkl" if platform.machine() == "x86_64" else "cmeel-openblas"
    return BackendReport(
        "reference BLAS", f"no fast BLAS found, CPU inference is about 90 times slower; remedy: pip install {remedy}"
    )


@cache
def few_rows_library() -> ctypes.CDLL | None:
    """An OpenBLAS with small-matrix kernels for this processor, if there is one. Thread: any.

    It multiplies up to 16 rows in half of MKL's time (measured on AVX-512); large products take both as long. Its names
    stay out of the process's, where they would take the place of those of the OpenBLAS that comes with numpy.
    """
    path = _library(FEW_ROWS_DISTRIBUTION, "libscipy_openblas.so")
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    core = library[f"{FEW_ROWS_PREFIX}openblas_get_corename"]
    core.restype = ctypes.c_char_p
    return library if core().decode() in FEW_ROWS_CORES else None


def device() -> Device:
    """The default device and its memory now. Thread: any, after `prepare`."""
    import mlx.core as mx  # noqa: PLC0415 - `prepare` has to run before

    memory = psutil.virtual_memory()
    if mx.default_device() != mx.Device(mx.gpu):
        return Device("cpu", platform.processor() or platform.machine(), memory.total, memory.available)
    info = mx.device_info()
    name = str(info.get("device_name", "GPU"))
    if mx.metal.is_available():
        limit = int(info.get("max_recommended_working_set_size", memory.total))
        return Device("metal", name, limit, min(limit - mx.get_active_memory(), memory.available))
    total = int(info.get("total_memory", memory.total))
    return Device("cuda", name, total, int(info.get("free_memory", total - mx.get_active_memory())))


def give_back() -> None:
    """Return to the system what MLX and the C library keep of freed memory. Thread: any, after `prepare`."""
    import mlx.core as mx  # noqa: PLC0415 - `prepare` has to run before

    mx.clear_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def configure() -> None:
    """Set the limits that this device wants. Thread: the MLX thread, before a model is loaded.

    On Metal the model's memory is wired, so that macOS does not page it out between requests, and the buffer cache is
    kept to an eighth of the working set. Elsewhere MLX's defaults hold.
    """
    import mlx.core as mx  # noqa: PLC0415 - `prepare` has to run before

    here = device()
    if here.kind == "metal":
        mx.set_wired_limit(here.total_bytes)
        mx.set_cache_limit(here.total_bytes // 8)


def usable_cores() -> int:
    """Physical cores this process may use: its affinity and its control group's quota respected."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical, _quota_cores()))


def _quota_cores() -> int:
    """The control group's CPU quota in whole cores (cgroup v2's cpu.max); no quota is very many."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):
        return sys.maxsize


def _threads_of_environment() -> int | None:
    for variable in THREAD_VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None


def _has_cuda() -> bool:
    for distribution in ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"):
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def _library(distribution: str, stem: str) -> Path | None:
    """The shared library of an installed distribution, by its own list of files."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = sorted(Path(str(file.locate())).resolve() for file in files if file.name.startswith(stem))
    return found[0] if found else None


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: page faults on every new array cost a tenth of a decode step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    except (OSError, AttributeError):
        # Another C library; it has its own ways.
        return


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
