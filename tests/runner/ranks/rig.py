"""What tests of ranks as processes share: hostfiles on loopback, an `ssh` that leads nowhere far, who is left."""

import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from runner.parent import Child

LOOPBACK = "127.0.0.1"
ELSEWHERE = "mac-b"
"""A name that only the test's own `ssh` knows."""


def write_hostfile(folder: Path, names: Sequence[str] = (LOOPBACK, LOOPBACK), **more: object) -> Path:
    """A hostfile whose hosts all listen on loopback."""
    file = folder / "hosts.json"
    hosts = [{"ssh": name, "ips": [LOOPBACK]} for name in names]
    file.write_text(json.dumps({"hosts": hosts, **more} if more else hosts))
    return file


def write_ssh(folder: Path, script: str) -> dict[str, str]:
    """An environment in which `ssh` is a script; in it `$host` is the machine and `$remote` what shall run there."""
    bin_ = folder / "bin"
    bin_.mkdir()
    file = bin_ / "ssh"
    file.write_text(f'#!/bin/bash\nhost="${{@: -2:1}}"\nremote="${{@: -1}}"\n{script}\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}


def ranks_of(child: Child) -> list[psutil.Process]:
    """The other ranks of a runner, on this machine."""
    found = []
    for process in psutil.Process(child.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[-3:] == ["-m", "runner", "rank"]:
                found.append(process)
    return found


def left(processes: Sequence[psutil.Process], timeout_s: float = 20) -> list[psutil.Process]:
    """Those that are still there after a while at most; ended ones that nobody has reaped are not."""
    _, alive = psutil.wait_procs(processes, timeout_s)
    return [each for each in alive if _lives(each)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
