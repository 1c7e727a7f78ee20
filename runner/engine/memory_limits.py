"""How much more memory this process may take: the machine's figure, bounded by the control groups it runs in.

A container's limit is invisible to the machine's own figures; passing it means being killed without a word.
"""

from pathlib import Path

from models.device import Device

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def _number(file: Path) -> int | None:
    """A file's only number; None where there is no file or it says `max`."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(stat: Path, key: str) -> int:
    """File pages that the kernel drops before it kills anybody; they count as used."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


def _headroom(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    most, used = _number(folder / limit), _number(folder / usage)
    if most is None or used is None:
        return None
    return max(0, most - used + min(used, _reclaimable(folder / "memory.stat", reclaimable)))


def cgroup_headroom(root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes left under the tightest memory limit of this process's control groups; None if nothing limits it.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    rooms: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may name a folder of the host's tree; the walk up ends at what is mounted here.
        folder = base / path.lstrip("/")
        for candidate in (folder, *folder.parents[: len(folder.parts) - len(base.parts)]):
            room = _headroom(candidate, *names)
            if room is not None:
                rooms.append(room)
    return min(rooms, default=None)


def available_bytes(device: Device) -> int:
    """What this process may still take of the device's memory. Thread: any."""
    room = cgroup_headroom()
    return device.available_bytes if room is None else min(device.available_bytes, room)


def in_words(nbytes: int) -> str:
    """A size for a person to read."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.0f} MiB"
