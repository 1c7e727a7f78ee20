"""The world of the demonstration model: one coloured shape on a coloured ground, and sentences that ask for it.

Everything is numpy: no picture library, no torch. Pictures are (64, 64, 3) uint8, rows downwards.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS = {
    "red": (222, 36, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 222, 40),
    "green": (30, 158, 70),
    "blue": (36, 84, 220),
    "purple": (140, 50, 176),
}
GROUNDS = {
    "white": (250, 250, 250),
    "black": (16, 16, 16),
    "grey": (150, 150, 150),
    "pink": (250, 184, 208),
}
# Half the extent of a shape, the offset of its centre (both pixels), and its turn (degrees).
RADIUS, OFFSET, TURN = (18.0, 24.0), 4.0, 10.0

Combination = tuple[str, str, str]


@dataclass(frozen=True)
class Placement:
    """Where shapes lie; every field is a (B,) array: centre and radius in pixels, turn in radians."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    turn: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """One of the test prompts and what its picture has to show."""

    text: str
    seed: int
    shape: str
    colour: str
    ground: str


def combinations() -> list[Combination]:
    """All (shape, colour, ground)."""
    return [(s, c, g) for s in SHAPES for c in COLOURS for g in GROUNDS]


def is_held_out(combination: Combination) -> bool:
    """Whether no training picture shows this: one shape of five for each pair of colour and ground (24 of 120)."""
    shape, colour, ground = combination
    s, c, g = SHAPES.index(shape), list(COLOURS).index(colour), list(GROUNDS).index(ground)
    return (s + 2 * c + 3 * g) % len(SHAPES) == 0


def place(rng: np.random.Generator, count: int) -> Placement:
    """Draw `count` placements."""
    middle = SIZE / 2
    x, y = middle + rng.uniform(-OFFSET, OFFSET, (2, count))
    return Placement(x, y, rng.uniform(*RADIUS, count), np.radians(rng.uniform(-TURN, TURN, count)))


def _regular(x: np.ndarray, y: np.ndarray, corners: int, inner: float, outer: np.ndarray | float) -> np.ndarray:
    """Distance to a star (or, where inner = cos(pi / corners), a regular polygon) with one corner upwards.

    The plane is folded into half a sector, where the outline is one straight line.
    """
    sector = np.pi / corners
    angle = np.arctan2(x, -y)
    angle = np.abs((angle + sector) % (2 * sector) - sector)
    r = np.hypot(x, y)
    fx, fy = r * np.sin(angle), r * np.cos(angle)
    ex, ey = inner * np.sin(sector), inner * np.cos(sector) - 1.0
    length = np.hypot(ex, ey)
    return (fx * -ey + (fy - outer) * ex) / length


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Signed distance in pixels (negative inside, exact enough at the outline) of points around the centre."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82 * radius
    if shape == "triangle":
        return _regular(x, y - 0.15 * radius, 3, 0.5, 1.1 * radius)
    if shape == "star":
        return _regular(x, y - 0.05 * radius, 5, 0.45, 1.15 * radius)
    if shape == "heart":
        side = 0.56 * radius  # half the side of a square that stands on a corner; a circle on each upper side
        v = y - 0.08 * radius
        a, b = (x + v) / np.sqrt(2), (v - x) / np.sqrt(2)
        square = np.maximum(np.abs(a), np.abs(b)) - side
        lobes = np.minimum(np.hypot(a, b + side), np.hypot(a + side, b)) - side
        return np.minimum(square, lobes)
    raise ValueError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")


def cover(shape: str, where: Placement) -> np.ndarray:
    """How much of each pixel the shape covers: (B, 64, 64) in 0..1."""
    grid = np.arange(SIZE) + 0.5
    x = grid[None, None, :] - where.x[:, None, None]
    y = grid[None, :, None] - where.y[:, None, None]
    cos, sin = np.cos(where.turn)[:, None, None], np.sin(where.turn)[:, None, None]
    d = distance(shape, x * cos + y * sin, y * cos - x * sin, where.radius[:, None, None])
    return np.clip(0.5 - d, 0.0, 1.0)


def draw(combination: Combination, where: Placement) -> np.ndarray:
    """Pictures of one combination: (B, 64, 64, 3) uint8."""
    shape, colour, ground = combination
    a = cover(shape, where)[..., None]
    picture = a * np.array(COLOURS[colour], float) + (1 - a) * np.array(GROUNDS[ground], float)
    return np.rint(picture).astype(np.uint8)


# Phrasings to train with; only the test prompts use those of UNSEEN.
BACKS = ("background", "ground", "backdrop")
SEEN = (
    "{a} {c} {s} on {b} {g} {back}",
    "{c} {s} on {g}",
    "{c} {s}, {g} {back}",
    "{b} {g} {back} with {a} {c} {s}",
    "{b} {g} picture with {a} {c} {s} in the middle",
    "draw {a} {c} {s} on {b} {g} {back}",
    "please draw {a} {c} {s} on {g}",
    "{a} {s} in {c} on {b} {g} {back}",
    "{a} {s} that is {c}, on {g}",
    "{a} picture of {a} {c} {s} on {b} {g} {back}",
    "paint me {a} {c} {s} with {b} {g} {back}",
    "{g} {back}, {c} {s}",
    "I want to see {a} {c} {s} on {g}, please",
    "show {a} {c} {s} in front of {b} {g} {back}",
    "the {s} is {c} and the {back} is {g}",
    "the {back} is {g} and the {s} is {c}",
    "on {b} {g} {back}: {a} {c} {s}",
    "one big {c} {s} on {g} paper",
    "{c} {s} {g}",
    "{s}, {c}, on {g}",
)
UNSEEN = (
    "can you draw {a} {c} {s} on {b} {g} {back}?",
    "an image of {a} {c} {s}, the {back} is {g}",
    "{a} large {c} {s} in the middle of {b} {g} picture",
    "{g} paper with {a} {c} {s} on it",
)


def _fill(template: str, combination: Combination, back: str) -> str:
    shape, colour, ground = combination
    text = template.replace("{a} {c}", "an {c}") if colour == "orange" else template
    return text.format(a="a", b="a", c=colour, s=shape, g=ground, back=back)


def caption(rng: np.random.Generator, combination: Combination) -> str:
    """A sentence for the combination in one of the seen phrasings, at times capitalised or in capitals."""
    text = _fill(SEEN[rng.integers(len(SEEN))], combination, BACKS[rng.integers(len(BACKS))])
    if rng.random() < 0.1:
        text = text.replace("grey", "gray")
    return (text, text.capitalize(), text.upper(), text + ".")[rng.choice(4, p=(0.6, 0.2, 0.1, 0.1))]


def held_out_prompts() -> list[Prompt]:
    """The 48 prompts of the score: each held-out combination twice, once in an unseen phrasing."""
    prompts = []
    held_out = [c for c in combinations() if is_held_out(c)]
    for i, combination in enumerate(held_out):
        seen, unseen = SEEN[(7 * i) % len(SEEN)], UNSEEN[i % len(UNSEEN)]
        for j, template in enumerate((seen, unseen)):
            text = _fill(template, combination, BACKS[(i + j) % len(BACKS)])
            prompts.append(Prompt(text, 1000 + 2 * i + j, *combination))
    return prompts
