"""What the step cache saves and what it costs, and a decode in strips beside a whole one: the runner's parts alone."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.image import blas
from tests.bench.commands import REPOSITORY
from tests.bench.image_soak import PROMPTS, SIDE, soak_pipeline

if TYPE_CHECKING:
    from models.image.base import ImagePipeline, ImageResult, Pixels

THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
SEEDS = (1, 2)
TILE = 16
"""Latents: the bench's 32 x 32 are more than a square of it, so they are taken in strips."""


def load(folder: Path) -> "ImagePipeline":
    from models.checkpoint import open_checkpoint
    from models.image import load_image_pipeline
    from models.image.base import LoadChoices

    return load_image_pipeline(open_checkpoint(str(folder), Path()), LoadChoices(policy="float32"))


def paint(
    pipeline: "ImagePipeline", prompt: str, seed: int, steps: int, threshold: float
) -> tuple["ImageResult", float]:
    """A picture, and the seconds of its denoising steps."""
    from models.image.base import ImageResult, ImageStep, PictureRequest

    request = PictureRequest(
        prompt, SIDE, SIDE, steps, seed, guidance=pipeline.abilities.guidance, step_cache=threshold
    )
    begin = end = time.perf_counter()
    for unit in pipeline.generate(request):
        if isinstance(unit, ImageResult):
            return unit, end - begin
        if isinstance(unit, ImageStep) and unit.phase == "encode":
            begin = time.perf_counter()
        elif unit.phase == "denoise":
            end = time.perf_counter()
    raise LookupError("no picture")


def step_cache() -> dict[str, Any]:
    """On a trained model if there is one: random weights say nothing about what may be left out."""
    folder = soak_pipeline()
    pipeline = load(folder)
    steps = pipeline.abilities.steps
    asked = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
    whole = [paint(pipeline, prompt, seed, steps, 0.0) for prompt, seed in asked]
    rows = []
    for threshold in THRESHOLDS:
        made = [paint(pipeline, prompt, seed, steps, threshold) for prompt, seed in asked]
        apart = [
            np.abs(one.pixels.astype(int) - other.pixels) for (one, _), (other, _) in zip(made, whole, strict=True)
        ]
        rows.append(
            {
                "threshold": threshold,
                "computed": float(np.mean([result.steps_computed for result, _ in made])),
                "time_share": sum(seconds for _, seconds in made) / sum(seconds for _, seconds in whole),
                "mean_apart": float(np.mean(apart)),
            }
        )
    named = str(folder.relative_to(REPOSITORY))
    return {"pipeline": named, "steps": steps, "side": SIDE, "pictures": len(asked), "rows": rows}


def decoded(folder: Path, tile: int) -> tuple["Pixels", float]:
    """The pipeline's latents as a picture, in strips if they are more than a square of `tile`; and the seconds."""
    import mlx.core as mx

    from models.checkpoint import open_checkpoint
    from models.image.autoencoder import Autoencoder, read_autoencoder_config, to_pixels
    from models.image.base import LoadChoices
    from models.image.loading import component_config, load_component
    from models.image.tiling import Tiling

    checkpoint = open_checkpoint(str(folder), Path())
    autoencoder = Autoencoder(read_autoencoder_config(component_config(checkpoint, "vae")), Tiling(tile))
    load_component(autoencoder, checkpoint, "vae", LoadChoices(policy="float32"))
    autoencoder.prepare()
    with np.load(folder / "inputs.npz") as inputs:
        latents = mx.array(inputs["latents"]).transpose(0, 2, 3, 1)
    to_pixels(autoencoder.decode(latents[:, :8, :8]))
    begin = time.perf_counter()
    return to_pixels(autoencoder.decode(latents)), time.perf_counter() - begin


def strips(folder: Path) -> dict[str, Any]:
    whole, whole_s = decoded(folder, 0)
    cut, cut_s = decoded(folder, TILE)
    apart = np.abs(whole.astype(int) - cut)
    return {
        "tile": TILE,
        "tiled_s": cut_s,
        "whole_s": whole_s,
        "mean_apart": float(apart.mean()),
        "most_apart": float(apart.max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    blas.prepare(threads=given.threads)
    from models.mlx_memory import configure

    configure()
    print(json.dumps({"step_cache": step_cache(), "tiles": strips(given.pipeline)}))
