"""What a picture shows, measured from its pixels alone.

The ground is the median of the border; the shape is made of the pixels that are nearer to the picture's other colour
than to the ground; its name is that of the drawn shape, in the same place and of the same area, that overlaps it best.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from tests.demo_model import world

NOTHING = "nothing"
BORDER = 2
DIFFERENT = 48.0  # from the ground, in RGB of 0..255, for a pixel to belong to the shape
TOLERANCE = 60.0  # from a name's colour, in RGB of 0..255, to be still called by it
OVERLAP = 0.85  # intersection over union below which a shape has no name
TURNS = np.radians(np.arange(-15, 15.1, 2.5))


@dataclass(frozen=True)
class Verdict:
    """What was seen; `overlap` is the intersection over union with the shape of that name."""

    shape: str
    colour: str
    ground: str
    overlap: float

    def agrees(self, shape: str, colour: str, ground: str) -> tuple[bool, bool, bool]:
        """Which of the three are as asked for."""
        return self.shape == shape, self.colour == colour, self.ground == ground


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    far = {name: float(np.linalg.norm(rgb - np.array(entry))) for name, entry in palette.items()}
    best = min(far, key=far.__getitem__)
    return best if far[best] <= TOLERANCE else NOTHING


def _cover(shape: str, x: float, y: float, radius: float, turn: float) -> np.ndarray:
    return world.cover(shape, world.Placement(*(np.array([v]) for v in (x, y, radius, turn))))[0]


@cache
def _proportions(shape: str, turn: float) -> tuple[float, float, float]:
    """Area in units of the squared radius, and the centre of mass in units of the radius, of a drawn shape."""
    centre, radius, grid = world.SIZE / 2, 22.0, np.arange(world.SIZE) + 0.5
    drawn = _cover(shape, centre, centre, radius, turn)
    area = drawn.sum()
    x, y = drawn.sum(0) @ grid / area, drawn.sum(1) @ grid / area
    return float(area / radius**2), float((x - centre) / radius), float((y - centre) / radius)


def _template(shape: str, turn: float, area: float, x: float, y: float) -> np.ndarray:
    """The drawn shape as a (64, 64) mask of about that area (pixels), with its centre of mass at x, y (pixels)."""
    unit, dx, dy = _proportions(shape, turn)
    radius = float(np.sqrt(area / unit))
    return _cover(shape, x - dx * radius, y - dy * radius, radius, turn) >= 0.5


def name_shape(mask: np.ndarray) -> tuple[str, float]:
    """The name of the shape in a (64, 64) mask and its overlap in 0..1."""
    area = float(mask.sum())
    if area < 0.02 * mask.size or area > 0.8 * mask.size:
        return NOTHING, 0.0
    grid = np.arange(world.SIZE) + 0.5
    x, y = float(mask.sum(0) @ grid) / area, float(mask.sum(1) @ grid) / area
    best = (NOTHING, 0.0)
    for shape in world.SHAPES:
        for turn in TURNS if shape != "circle" else (0.0,):
            template = _template(shape, float(turn), area, x, y)
            overlap = float((mask & template).sum() / (mask | template).sum())
            if overlap > best[1]:
                best = (shape, overlap)
    return best if best[1] >= OVERLAP else (NOTHING, best[1])


def judge(picture: np.ndarray) -> Verdict:
    """Look at one (64, 64, 3) uint8 picture."""
    p = picture.astype(float)
    edge = np.ones(p.shape[:2], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(p[edge], axis=0)
    far = np.linalg.norm(p - ground, axis=2)
    rough = far > DIFFERENT
    if rough.sum() < 0.02 * rough.size:
        return Verdict(NOTHING, NOTHING, _nearest(ground, world.GROUNDS), 0.0)
    inner = far >= np.median(far[rough]) - 8.0  # leaves out the blended pixels of the outline
    colour = p[rough & inner].mean(axis=0)
    mask = np.linalg.norm(p - colour, axis=2) < far
    shape, overlap = name_shape(mask)
    return Verdict(shape, _nearest(colour, world.COLOURS), _nearest(ground, world.GROUNDS), overlap)
