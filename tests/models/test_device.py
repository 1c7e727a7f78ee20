import importlib.metadata
import os
import sys
from pathlib import Path

import psutil
import pytest

from models import device as module
from models.device import device, has_cuda_package, may_have_gpu, usable_cores


@pytest.fixture
def quota(monkeypatch: pytest.MonkeyPatch):
    """`quota("200000 100000")` is what the control group's cpu.max says; None: there is no such file."""
    read_text = Path.read_text

    def say(text: str | None) -> None:
        def read(path: Path, *more: object, **named: object) -> str:
            if str(path) != "/sys/fs/cgroup/cpu.max":
                return read_text(path, *more, **named)
            if text is None:
                raise FileNotFoundError(str(path))
            return text

        monkeypatch.setattr(Path, "read_text", read)

    return say


@pytest.mark.skipif(sys.platform != "linux", reason="affinity and control groups are Linux's")
@pytest.mark.parametrize(
    ("allowed", "physical", "said", "expected"),
    [
        (8, 4, None, 4),
        (2, 4, None, 2),
        (8, 8, "max 100000\n", 8),
        (8, 8, "200000 100000\n", 2),
        (8, 8, "250000 100000\n", 3),
        (8, 8, "10000 100000\n", 1),
        (2, 8, "400000 100000\n", 2),
        (8, None, None, 8),
    ],
)
def test_cores_are_the_physical_ones_that_affinity_and_quota_leave(
    monkeypatch: pytest.MonkeyPatch, quota, allowed: int, physical: int | None, said: str | None, expected: int
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr(psutil, "cpu_count", lambda *, logical: pytest.fail("hyperthreads") if logical else physical)
    quota(said)
    assert usable_cores() == expected


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def version(name: str) -> str:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("name", ["mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"])
def test_a_package_for_cuda_is_a_gpu_perhaps(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(sys, "platform", "linux")
    installed(monkeypatch, "mlx")
    assert not has_cuda_package()
    assert not may_have_gpu()
    installed(monkeypatch, "mlx", name)
    assert has_cuda_package()
    assert may_have_gpu()


def test_a_mac_has_a_gpu_perhaps(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert may_have_gpu()


def test_without_a_gpu_the_device_is_the_processor_and_the_machines_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "may_have_gpu", lambda: False)
    monkeypatch.setattr(module, "_gpu", lambda: pytest.fail("asked for a GPU"))
    here = device()
    assert (here.kind, here.total_bytes) == ("cpu", psutil.virtual_memory().total)
    assert 0 < here.available_bytes < here.total_bytes
    assert here.name


def test_an_mlx_that_may_have_a_gpu_and_has_none_is_the_processor(monkeypatch: pytest.MonkeyPatch):
    import mlx.core as mx

    monkeypatch.setattr(module, "may_have_gpu", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert device().kind == "cpu"
