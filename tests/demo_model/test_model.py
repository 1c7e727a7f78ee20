"""The model that comes along draws what it is told, through this project's own pipeline."""

from pathlib import Path

import pytest

import models
from models.checkpoint import open_checkpoint
from models.image import load_image_pipeline
from models.image.base import ImageResult, LoadChoices, PictureRequest
from tests.demo_model import world
from tests.demo_model.judge import judge

SHAPES = Path(models.__file__).parent / "image" / "shapes"
LEAST_RIGHT = 0.9


@pytest.fixture(scope="module")
def pipeline():
    return load_image_pipeline(open_checkpoint(str(SHAPES), SHAPES), LoadChoices())


def draw(pipeline, prompt):
    own = pipeline.abilities
    asked = PictureRequest(
        prompt.text, world.SIZE, world.SIZE, steps=own.steps, seed=prompt.seed, guidance=own.guidance
    )
    *_, result = pipeline.generate(asked)
    assert isinstance(result, ImageResult)
    return result.pixels


def test_it_obeys_prompts_that_it_was_never_trained_on(pipeline):
    wrong = []
    prompts = world.held_out_prompts()
    assert len(prompts) == 48
    for prompt in prompts:
        verdict = judge(draw(pipeline, prompt))
        if not all(verdict.agrees(prompt.shape, prompt.colour, prompt.ground)):
            wrong.append(f"{prompt.text}: {verdict}")
    print("\n".join(wrong))
    assert len(wrong) <= len(prompts) * (1 - LEAST_RIGHT), wrong
