"""A picture of many channels on the host, in float32 or, where it is too large for that, in bfloat16.

Numpy knows no bfloat16: it is the upper half of a float32, so it is held as uint16. Only storage is narrow; whoever
computes widens a part first.
"""

from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Halves: TypeAlias = npt.NDArray[np.uint16]

ALIGNMENT = 8
"""Rows and columns are allocated in multiples of it, so that every tile of outputs has its place."""

HALF_UNIT = np.uint32(0x8000)
"""Half of bfloat16's last place, as bits of a float32: added before the lower half is cut off, it rounds."""


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """`data` (rows, columns, C) may be larger than the picture; nobody reads what is outside."""

    data: Floats | Halves
    height: int
    width: int

    @classmethod
    def empty(cls, height: int, width: int, channels: int, *, half: bool = False) -> "FeatureMap":
        """One with room for every tile, its values arbitrary; what is outside is finite, for sums run over it too."""
        rows, columns = (-(-side // ALIGNMENT) * ALIGNMENT for side in (height, width))
        shape = (rows, columns, channels)
        data = np.empty(shape, np.uint16) if half else np.empty(shape, np.float32)
        data[height:] = data[:, width:] = 0
        return cls(data, height, width)

    @classmethod
    def copy_of(cls, picture: Floats) -> "FeatureMap":
        """Shapes: picture (H, W, C)."""
        made = cls.empty(*picture.shape)
        made.inside[...] = picture
        return made

    @property
    def half(self) -> bool:
        """Whether it is held in bfloat16."""
        return self.data.dtype == np.uint16

    @property
    def inside(self) -> Floats:
        """The picture itself, (H, W, C), a view. Only of one held in float32."""
        assert not self.half
        return cast("Floats", self.data[: self.height, : self.width])

    @property
    def channels(self) -> int:
        """C."""
        return int(self.data.shape[2])

    def rows(self, part: slice) -> "FeatureMap":
        """Some rows of it as a picture of its own, a view."""
        return FeatureMap(self.data[part], part.stop - part.start, self.width)

    def matrix(self, part: slice) -> Floats:
        """Some rows in float32, (pixels, C): a view where that is possible, else a copy."""
        inside = self.data[part, : self.width]
        if self.half:
            return widened(cast("Halves", inside)).reshape(-1, self.channels)
        return cast("Floats", inside.reshape(-1, self.channels))


def widened(values: Halves, out: Floats | None = None) -> Floats:
    """To float32, exactly. Shapes: alike."""
    if out is None:
        out = np.empty(values.shape, np.float32)
    bits = out.view(np.uint32)
    bits[...] = values
    np.left_shift(bits, 16, out=bits)
    return out


def narrow(values: Floats, out: Halves) -> None:
    """To bfloat16, rounded to the nearest; `values` are overwritten. Shapes: alike; the values are contiguous."""
    bits = values.view(np.uint32)
    bits += HALF_UNIT
    out[...] = values.view(np.uint16)[..., 1::2]
