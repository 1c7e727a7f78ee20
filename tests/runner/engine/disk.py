"""What tests of the disk cache share: whose it is, what it may hold, and the files in its folder."""

from collections.abc import Callable
from pathlib import Path

from runner.engine.disk_cache import DiskCache

LIMIT = 64 << 20
MODEL = "0123456789abcdef"
Open = Callable[..., DiskCache]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
