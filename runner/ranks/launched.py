"""Ranks that mlx.launch has started: they are MLX's group first, and tell each other through it where to connect.

Source: mlx v0.32 mlx/_distributed_utils/launch.py for what stands in their environment.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from runner.errors import StartupError
from runner.ranks.first import Ranks
from runner.ranks.hostfile import Host
from runner.ranks.joining import join
from runner.ranks.rank import Invitation, follow

if TYPE_CHECKING:
    import mlx.core as mx

_LONGEST = 256
_LOOPBACK = "127.0.0.1"


def first_of_launched(environ: Mapping[str, str]) -> Ranks:
    """The other ranks, as the first one of those that mlx.launch has started. Thread: the main one.

    Raises:
        StartupError: MLX cannot connect them, or they cannot tell each other.
    """
    group = _joined(environ)
    ranks = Ranks(_hosts(environ, group.size()), None, group)
    ip, port = ranks.listen()
    _told(group, f"{ip} {port} {ranks.secret}")
    return ranks


def follow_launched(environ: Mapping[str, str], store: Path) -> None:
    """Be another one of them, until the first is gone. Thread: the main one. Raises StartupError, OSError."""
    group = _joined(environ)
    ip, port, secret = _told(group, "").split()
    follow(Invitation(group.rank(), group.size(), (), (ip, int(port)), secret, {}), store, group)


def _joined(environ: Mapping[str, str]) -> "mx.distributed.Group":
    backend = "ring" if "MLX_HOSTFILE" in environ else "jaccl" if "MLX_IBV_DEVICES" in environ else "nccl"
    try:
        return join({}, backend, "all hosts")
    except RuntimeError as error:
        raise StartupError(f"MLX could not connect the ranks that mlx.launch started: {error}") from error


def _hosts(environ: Mapping[str, str], count: int) -> list[Host]:
    """Every rank's host by its address, as far as it is known."""
    if "MLX_HOSTFILE" in environ:
        entries = json.loads(Path(environ["MLX_HOSTFILE"]).read_text())
        ips = [str(addresses[0]).rpartition(":")[0] for addresses in entries]
    else:
        known = environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0] or environ.get("NCCL_HOST_IP", _LOOPBACK)
        ips = [known, *(f"rank {rank}" for rank in range(1, count))]
    return [Host(ip, (ip,)) for ip in ips]


def _told(group: "mx.distributed.Group", text: str) -> str:
    """What the first rank says, on every rank."""
    import mlx.core as mx  # noqa: PLC0415 - it is imported where ranks are asked for

    padded = text.encode().ljust(_LONGEST, b"\0")
    assert len(padded) == _LONGEST
    heard = mx.distributed.all_sum(mx.array(list(padded), dtype=mx.int32), group=group)
    said = cast("list[int]", heard.tolist())
    return bytes(said).rstrip(b"\0").decode()
