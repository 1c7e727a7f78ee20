"""How ranks become MLX's group: what `mlx.launch` puts into each one's environment, and the call that reads it.

Source: mlx v0.32 mlx/_distributed_utils/launch.py.
"""

import json
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.ranks.guard import killed_after
from runner.ranks.hostfile import Hostfile

if TYPE_CHECKING:
    import mlx.core as mx

JOIN_S = 30.0
"""What joining may take once every rank is there."""


def free_ports(ips: Sequence[str]) -> list[int]:
    """A port that was free a moment ago on each address. Raises OSError: one is not this machine's."""
    probes = []
    for ip in ips:
        probe = socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
        probes.append(probe)
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def environments(hostfile: Hostfile, ports: Sequence[Sequence[int]]) -> list[dict[str, str]]:
    """What each rank's environment says, by the ports that each has free; long values are to be in files."""
    hosts = hostfile.hosts
    first, port = hosts[0].ips[0], str(ports[0][0])
    made: list[dict[str, str]] = []
    for rank, host in enumerate(hosts):
        own = {"MLX_RANK": str(rank)}
        if hostfile.backend == "ring":
            addresses = [
                [f"{ip}:{number}" for ip, number in zip(each.ips, free, strict=True)]
                for each, free in zip(hosts, ports, strict=True)
            ]
            own["MLX_HOSTFILE"] = json.dumps(addresses)
        elif hostfile.backend.startswith("jaccl"):
            own |= {"MLX_IBV_DEVICES": json.dumps([each.rdma for each in hosts])}
            own |= {"MLX_JACCL_COORDINATOR": f"{first}:{port}"}
            own |= {"MLX_JACCL_RING": "1"} if hostfile.backend == "jaccl-ring" else {}
        else:
            beside = sum(each.name == host.name for each in hosts[:rank])
            own |= {"NCCL_HOST_IP": first, "NCCL_PORT": port, "MLX_WORLD_SIZE": str(len(hosts))}
            own |= {"CUDA_VISIBLE_DEVICES": str(beside)}
        made.append(own)
    return made


def join(environment: Mapping[str, str], backend: str, others: str) -> "mx.distributed.Group":
    """Join the group. MLX lets no other thread run meanwhile, so if it takes too long this process is killed.

    Raises:
        RuntimeError: MLX could not.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, value in environment.items():
            if name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
                # MLX wants these as files.
                file = Path(folder) / name
                file.write_text(value)
                os.environ[name] = str(file)
            else:
                os.environ[name] = value
        import mlx.core as mx  # noqa: PLC0415 - where ranks are asked for

        with killed_after(
            JOIN_S,
            f"the ranks could not connect within {JOIN_S:g} s; check that {others} reach each other on all of their "
            "addresses in the hostfile",
        ):
            return mx.distributed.init(strict=True, backend="jaccl" if backend.startswith("jaccl") else backend)
