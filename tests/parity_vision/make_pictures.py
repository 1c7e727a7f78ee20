"""Draw the pictures of the parity tests: odd sizes, gradients and shapes with edges, so that every pixel counts.

python tests/parity_vision/make_pictures.py
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent / "pictures"


def gradients(width: int, height: int, turn: float) -> Image.Image:
    """Each channel rises along a direction of its own, with waves on it."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = []
    for number in range(3):
        angle = turn + 2.1 * number
        along = np.cos(angle) * x + np.sin(angle) * y
        waves = 0.2 * np.sin((9 + 4 * number) * (x * np.sin(angle) - y * np.cos(angle)) * 3)
        channels.append(0.5 + 0.4 * along + waves)
    return Image.fromarray((np.clip(np.stack(channels, axis=-1), 0, 1) * 255).astype(np.uint8), "RGB")


def main() -> None:
    """Write both."""
    FOLDER.mkdir(exist_ok=True)
    wide = gradients(61, 43, 0.4)
    draw = ImageDraw.Draw(wide)
    draw.ellipse((6, 5, 27, 30), fill=(240, 190, 20), outline=(10, 10, 60))
    draw.polygon([(58, 3), (35, 22), (52, 39)], fill=(20, 70, 200))
    draw.line((0, 42, 60, 0), fill=(255, 255, 255))
    wide.save(FOLDER / "0-wide.png")
    tall = gradients(37, 90, 2.3)
    draw = ImageDraw.Draw(tall)
    draw.rectangle((4, 9, 20, 33), fill=(200, 30, 60), outline=(0, 0, 0))
    draw.ellipse((11, 50, 35, 86), outline=(250, 250, 90), width=3)
    draw.line((2, 88, 34, 40), fill=(0, 255, 120), width=2)
    tall.save(FOLDER / "1-tall.png")


if __name__ == "__main__":
    main()
