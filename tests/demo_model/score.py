"""Let diffusers' ZImagePipeline draw the 48 test prompts from an exported folder, and judge them.

python -m tests.demo_model.score models/image/shapes [--steps 10] [--guidance 2] [--grid samples.png]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import ZImagePipeline
from PIL import Image, ImageDraw

from tests.demo_model import world
from tests.demo_model.judge import Verdict, judge


def sample(pipeline: ZImagePipeline, prompts: list[world.Prompt], steps: int, guidance: float) -> np.ndarray:
    """Pictures of the prompts, each from its own seed: (B, 64, 64, 3) uint8."""
    images = pipeline(
        [p.text for p in prompts],
        height=world.SIZE,
        width=world.SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(p.seed) for p in prompts],
        max_sequence_length=64,
    ).images
    return np.stack([np.asarray(image) for image in images])


def grid(pictures: np.ndarray, labels: list[str], across: int = 8, zoom: int = 3) -> Image.Image:
    """The pictures enlarged, each with its label underneath in lines of at most 32 letters."""
    side, foot = pictures.shape[1] * zoom, 30
    down = -(-len(pictures) // across)
    sheet = Image.new("RGB", (across * (side + 8), down * (side + foot)), (235, 235, 235))
    pen = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = i % across * (side + 8) + 4, i // across * (side + foot)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
        words, lines = label.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 31:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.text((x, y + side + 1), "\n".join(lines[:2]), fill=(0, 0, 0), spacing=1)
    return sheet


def report(prompts: list[world.Prompt], verdicts: list[Verdict]) -> str:
    """How many are right: all, shape, colour, ground; and what is wrong with each that is not."""
    right = np.array([v.agrees(p.shape, p.colour, p.ground) for p, v in zip(prompts, verdicts, strict=True)])
    shape, colour, ground = right.sum(axis=0)
    overlap = np.mean([v.overlap for v in verdicts])
    lines = [f"all right {right.all(axis=1).sum()}, shape {shape}, colour {colour}, ground {ground} of {len(prompts)}"]
    lines[0] += f"; overlap mean {overlap:.3f}"
    for p, v, fine in zip(prompts, verdicts, right.all(axis=1), strict=True):
        if not fine:
            lines.append(f"  {p.text!r} seed {p.seed}: {v.colour} {v.shape} on {v.ground}, overlap {v.overlap:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, sample, judge, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--shift", type=float, help="another than the folder's")
    parser.add_argument("--seeds", type=int, default=0, help="added to every prompt's seed")
    parser.add_argument("--every", type=int, default=1, help="take each n-th prompt only")
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = ZImagePipeline.from_pretrained(args.folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if args.shift:
        pipeline.scheduler.set_shift(args.shift)
    prompts = [
        world.Prompt(p.text, p.seed + args.seeds, p.shape, p.colour, p.ground)
        for p in world.held_out_prompts()[:: args.every]
    ]
    pictures = sample(pipeline, prompts, args.steps, args.guidance)
    print(report(prompts, [judge(picture) for picture in pictures]))
    if args.grid:
        grid(pictures, [p.text for p in prompts]).save(args.grid)


if __name__ == "__main__":
    main()
