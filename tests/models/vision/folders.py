"""A checkpoint's configuration files for families, without a folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.vision import Pixels


@dataclass(frozen=True)
class Folder:
    """Implements `Files`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def read(self, name: str) -> bytes | None:
        return json.dumps(self.files[name]).encode() if name in self.files else None


def blank(height: int, width: int) -> Pixels:
    return np.zeros((height, width, 3), np.uint8)
