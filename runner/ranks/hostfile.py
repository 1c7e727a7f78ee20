"""The machines that share a model, as mlx.launch's hostfile says them.

Source: mlx v0.32 mlx/_distributed_utils/common.py for the format; its keys that are not known here are passed over.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import StartupError

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BACKENDS = ("ring", "jaccl", "jaccl-ring", "nccl")


@dataclass(frozen=True, slots=True)
class Host:
    """One rank's machine."""

    name: str
    """What ssh calls it; a loopback address is this machine."""
    ips: tuple[str, ...]
    """Where it is reached by the other ranks, and where it listens."""
    rdma: tuple[Any, ...] = ()
    """For JACCL: its devices towards each rank."""
    python: str = sys.executable
    """The interpreter there that has this package."""

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        return self.name in _LOOPBACK


@dataclass(frozen=True, slots=True)
class Hostfile:
    """All ranks' machines, the first one's being this one."""

    hosts: tuple[Host, ...]
    backend: str
    environment: Mapping[str, str]
    """Of every rank besides."""


def read_hostfile(path: Path) -> Hostfile:
    """Read and check a hostfile. Thread: any.

    Raises:
        StartupError: it cannot be read, or says what makes no sense.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise StartupError(f"the hostfile {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StartupError(f"the hostfile {path} is not JSON: {error}") from error
    entries, backend = data, ""
    environment: list[str] = []
    if isinstance(data, dict):
        entries, backend, environment = data.get("hosts"), data.get("backend") or "", data.get("envs") or []
    try:
        hosts = tuple(_host(entry) for entry in entries)
        named = dict(_variable(each) for each in environment)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise StartupError(
            f'the hostfile {path} does not say its hosts as [{{"ssh": "NAME", "ips": ["ADDRESS"]}}, …]'
        ) from error
    _check(hosts, backend, path)
    return Hostfile(hosts, backend or "ring", named)


def _host(entry: Mapping[str, Any]) -> Host:
    python = entry.get("python") or sys.executable
    return Host(str(entry["ssh"]), tuple(map(str, entry.get("ips") or [])), tuple(entry.get("rdma") or []), str(python))


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.replace("_", "").isalnum():
        raise ValueError(text)
    return name, value


def _check(hosts: Sequence[Host], backend: str, path: Path) -> None:
    if len(hosts) < 2:
        raise StartupError(f"the hostfile {path} names {len(hosts)} hosts; two or more can share a model")
    if backend not in ("", *_BACKENDS):
        raise StartupError(f"the hostfile {path} wants the backend {backend!r}; known are {', '.join(_BACKENDS)}")
    for rank, host in enumerate(hosts):
        if not host.ips:
            raise StartupError(f"the hostfile {path} has no ips for {host.name} (rank {rank})")
    if backend.startswith("jaccl") and any(len(host.rdma) != len(hosts) for host in hosts):
        raise StartupError(f"the hostfile {path} must list {len(hosts)} rdma devices for each host, null for itself")
