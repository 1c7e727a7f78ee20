"""Draw the curves of the three trainings, read from their CSV files, one under another.

python -m tests.demo_model.curves FOLDER curves.png
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, LEFT, TOP = 900, 230, 60, 28
# file, column, what it is, how many rows are averaged, whether the axis is logarithmic
PANELS = (
    ("vae.csv", 2, "codec: PSNR of a training batch in dB, by step", 5, False),
    ("vae_decoder.csv", 2, "codec, decoder alone: PSNR of a training batch in dB, by step", 5, False),
    ("flow.csv", 1, "text encoder and transformer: mean squared error, by step (logarithmic)", 3, True),
)


def read(path: Path, column: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column, averaged over `window` rows. Of a step that was run twice the later row counts."""
    with path.open(newline="") as file:
        rows = {int(row[0]): float(row[column]) for row in csv.reader(file)}
    steps, values = np.array(sorted(rows)), np.array([rows[step] for step in sorted(rows)])
    return steps[window - 1 :], np.convolve(values, np.full(window, 1 / window), "valid")


def panel(path: Path, column: int, title: str, window: int, *, logarithmic: bool) -> Image.Image:
    """One curve with its lowest and highest value at the left and the last step at the right."""
    steps, values = read(path, column, window)
    heights = np.log(values) if logarithmic else values
    sheet = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    low, high = heights.min(), heights.max()
    bottom = HEIGHT - 24
    x = LEFT + (WIDTH - LEFT - 20) * steps / steps[-1]
    y = bottom - (bottom - TOP) * (heights - low) / (high - low)
    pen.rectangle((LEFT, TOP, WIDTH - 20, bottom), outline=(200, 200, 200))
    pen.line([*zip(x.tolist(), y.tolist(), strict=True)], fill=(36, 84, 220), width=2)
    pen.text((LEFT, 8), f"{title}; last {values[-1]:.4g}", fill=(0, 0, 0))
    pen.text((4, TOP), f"{values.max():.4g}", fill=(0, 0, 0))
    pen.text((4, bottom - 12), f"{values.min():.4g}", fill=(0, 0, 0))
    for part in range(5):
        step = round(steps[-1] * part / 4)
        pen.text((LEFT + (WIDTH - LEFT - 20) * part / 4 - 14, bottom + 6), str(step), fill=(0, 0, 0))
    return sheet


def main() -> None:
    """Read the arguments and write the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("to", type=Path)
    args = parser.parse_args()
    panels = [
        panel(args.folder / name, column, title, window, logarithmic=logarithmic)
        for name, column, title, window, logarithmic in PANELS
        if (args.folder / name).exists()
    ]
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), (255, 255, 255))
    for i, one in enumerate(panels):
        sheet.paste(one, (0, i * HEIGHT))
    sheet.save(args.to, optimize=True)


if __name__ == "__main__":
    main()
