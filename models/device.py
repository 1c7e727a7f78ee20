"""The device: what this machine computes on, its memory and its cores.

On Linux without MLX's CUDA package that is known without importing MLX, which a process on the CPU never needs.
"""

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import psutil

DeviceKind: TypeAlias = Literal["cpu", "metal", "cuda"]


@dataclass(frozen=True, slots=True)
class Device:
    """What a model runs on. Sizes in bytes."""

    kind: DeviceKind
    name: str
    total_bytes: int
    available_bytes: int


def device() -> Device:
    """The device and its memory now. Thread: any."""
    return _gpu() if may_have_gpu() else cpu()


def cpu() -> Device:
    """The processor and the machine's memory now. Thread: any."""
    memory = psutil.virtual_memory()
    return Device("cpu", platform.processor() or platform.machine(), memory.total, memory.available)


def may_have_gpu() -> bool:
    """Whether MLX, as it is installed here, may find a GPU. Thread: any."""
    return sys.platform == "darwin" or has_cuda_package()


def has_cuda_package() -> bool:
    """Whether MLX's package for CUDA is installed. Thread: any."""
    for distribution in ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"):
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def usable_cores() -> int:
    """Physical cores this process may use: its affinity and its control group's quota respected. Thread: any."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical, _quota_cores()))


def _gpu() -> Device:
    import mlx.core as mx  # noqa: PLC0415 - a process on the CPU does without it

    if mx.default_device() != mx.Device(mx.gpu):
        return cpu()
    memory, info = psutil.virtual_memory(), mx.device_info()
    name = str(info.get("device_name", "GPU"))
    if mx.metal.is_available():
        limit = int(info.get("max_recommended_working_set_size", memory.total))
        return Device("metal", name, limit, min(limit - mx.get_active_memory(), memory.available))
    total = int(info.get("total_memory", memory.total))
    return Device("cuda", name, total, int(info.get("free_memory", total - mx.get_active_memory())))


def _quota_cores() -> int:
    """The control group's CPU quota in whole cores (cgroup v2's cpu.max); no quota is very many."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):
        return sys.maxsize
