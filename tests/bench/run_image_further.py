"""What the step cache saves and what it costs, and a decode by tiles beside a whole one: the runner's parts alone."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import backend
from tests.bench.image_soak import PROMPTS, SIDE, soak_pipeline
from tests.bench.preparation import REPOSITORY

if TYPE_CHECKING:
    from models.image.base import ImagePipeline, ImageResult

THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
SEEDS = (1, 2)


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    backend.prepare(threads=given.threads)
    backend.configure()
    print(json.dumps({"step_cache": step_cache()}))
