"""GGUF text models with projector files, and with the tower in the same file, against what transformers says of them.

`make_gguf.py` makes them. A folder's two files are found beside each other.
"""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.arch import build_model
from models.checkpoint import Checkpoint, open_checkpoint
from models.executors.base import EncodedPicture
from models.tokenizer import load_tokenizer
from models.vision import Vision, family_of
from models.weights.matching import model_of
from tests.parity_vision.rows import EXECUTORS, HERE, PICTURES, Sight, load, pixels_of, planned, read_prompts, run

NAMES = sorted(folder.name for folder in (HERE / "projectors").iterdir())
TOLERANCE = 1e-4


def opened(name: str) -> Checkpoint:
    return open_checkpoint(str(HERE / "projectors" / name / "model.gguf"), HERE / "no-store")


def vision_of(checkpoint: Checkpoint) -> Vision:
    tokenizer = load_tokenizer(checkpoint)
    family = family_of(checkpoint)
    assert family is not None
    return family.build(checkpoint, lambda text: tokenizer.encode(text, add_bos=False))


def encoded(checkpoint: Checkpoint, vision: Vision, kind: str) -> list[EncodedPicture]:
    """Each picture, by a tower on an executor of that kind."""
    if kind == "onnx":
        from models.executors.onnx import load_tower
    else:
        from models.executors.mlx import load_tower
    encoder = load_tower(checkpoint, vision.tower)
    made = []
    for number in range(len(PICTURES)):
        steps = encoder.encode(vision.prepare(pixels_of(number)).passes)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                made.append(end.value)
                break
    encoder.close()
    return made


def sight_in(name: str, pictures: list[EncodedPicture]) -> Sight:
    checkpoint = opened(name)
    return Sight(vision_of(checkpoint), load_tokenizer(checkpoint), pictures)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_has_the_references_ids(name: str):
    empty = [EncodedPicture(np.zeros((0, 1), np.float32))] * len(PICTURES)
    sight = sight_in(name, empty)
    for prompt in read_prompts(f"projectors/{name}"):
        assert planned(sight, prompt.text).tokens == prompt.ids


@pytest.mark.parametrize(("name", "kind"), list(product(NAMES, EXECUTORS)))
def test_pictures_and_prompts_are_read_as_the_reference_reads_them(name: str, kind: str):
    checkpoint = opened(name)
    pictures = encoded(checkpoint, vision_of(checkpoint), kind)
    arrays = load_file(HERE / "projectors" / name / "reference.safetensors")
    scale = np.float32(32**0.5 if name == "gemma3" else 1.0)
    for number, made in enumerate(pictures):
        np.testing.assert_allclose(made.rows * scale, arrays[f"features.{number}"], rtol=0, atol=TOLERANCE)
    sight = sight_in(name, pictures)
    executor = load(f"projectors/{name}/model.gguf", kind)
    for slot, prompt in enumerate(read_prompts(f"projectors/{name}")):
        plan = planned(sight, prompt.text)
        (logits,) = run(executor, plan.row(slot, 0, plan.tokens))
        np.testing.assert_allclose(logits, prompt.logits, rtol=0, atol=TOLERANCE)
    executor.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_text_model_is_the_one_without_a_projector(name: str, tmp_path: Path):
    joined = opened(name)
    alone = tmp_path / "model.gguf"
    alone.symlink_to(HERE / "projectors" / name / "model.gguf")
    text = open_checkpoint(str(alone), tmp_path)
    assert "vision_config" not in text.config
    assert model_of(joined).weights == model_of(text).weights
    assert model_of(joined).state == model_of(text).state
    assert build_model(joined.config).config == build_model(text.config).config
