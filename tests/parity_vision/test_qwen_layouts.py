"""Qwens that see under the names that others give their tensors: the same rows, the same logits.

Source: transformers' `conversion_mapping` for older and newer names; mlx-vlm's `sanitize` of the models named.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.parity_vision.rows import (
    EXECUTORS,
    HERE,
    encoded_pictures,
    load,
    pixels_of,
    planned,
    read_prompts,
    run,
    sight_of,
)
from tests.parity_vision.test_towers import assert_close, finished
from tests.parity_vision.test_towers import load as load_tower

Arrays = dict[str, np.ndarray]


def _renamed(weights: Arrays, starts: dict[str, str]) -> Arrays:
    made: Arrays = {}
    for name, weight in weights.items():
        start = next((each for each in starts if name.startswith(each)), "")
        made[starts.get(start, "") + name.removeprefix(start)] = weight
    return made


def newer(weights: Arrays) -> Arrays:
    """What was published in the first form as it would be in the second."""
    return _renamed(weights, {"model.": "model.language_model.", "visual.": "model.visual."})


def of_mlx(weights: Arrays) -> Arrays:
    """Names of MLX's, a patch's channels last, experts in one tensor a projection."""
    starts = {
        "model.language_model.": "language_model.model.",
        "model.visual.": "vision_tower.",
        "visual.": "vision_tower.",
        "model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    made: Arrays = {}
    for name, weight in _renamed(weights, starts).items():
        stem, _, part = name.rpartition(".experts.")
        if part == "gate_up_proj":
            gate, up = np.split(weight.swapaxes(1, 2), 2, axis=1)
            made |= {f"{stem}.switch_mlp.{each}_proj.weight": own for each, own in (("gate", gate), ("up", up))}
        elif part == "down_proj":
            made[f"{stem}.switch_mlp.down_proj.weight"] = weight.swapaxes(1, 2)
        elif weight.ndim == 5:
            made[name] = np.moveaxis(weight, 1, -1)
        else:
            made[name] = weight
    return {name: np.ascontiguousarray(weight) for name, weight in made.items()}


def turned(weights: Arrays) -> Arrays:
    """Experts as (outputs, inputs), as transformers holds them."""
    return {
        name: np.ascontiguousarray(weight.swapaxes(1, 2)) if ".experts." in name else weight
        for name, weight in weights.items()
    }


LAYOUTS = [
    ("qwen2_5_vl", newer),
    ("qwen2_5_vl", of_mlx),
    ("qwen2_vl", newer),
    ("qwen3_vl", of_mlx),
    ("qwen3_vl_moe", of_mlx),
    ("qwen3_vl_moe", turned),
]


@pytest.fixture(params=LAYOUTS, ids=lambda param: f"{param[0]}-{param[1].__name__}")
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fixture with other names, its reference beside."""
    name, change = request.param
    made = tmp_path / name
    shutil.copytree(HERE / name, made)
    weights: Callable[[Arrays], Arrays] = change
    save_file(weights(load_file(HERE / name / "model.safetensors")), made / "model.safetensors", {"format": "pt"})
    return str(made)


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_checkpoint_under_other_names_says_the_same(folder: str, kind: str):
    sight, prompt = sight_of(folder), read_prompts(folder)[1]
    encoder = load_tower(folder, kind, sight.vision)
    for number, expected in enumerate(encoded_pictures(folder)):
        assert_close(finished(encoder.encode(sight.vision.prepare(pixels_of(number)).passes)), expected)
    encoder.close()
    executor, plan = load(folder, kind), planned(sight, prompt.text)
    (logits,) = run(executor, plan.row(0, 0, plan.tokens))
    executor.close()
    np.testing.assert_allclose(logits, prompt.logits, rtol=0, atol=2e-4)
