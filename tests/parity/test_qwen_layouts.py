"""Qwens with a gated delta rule in all forms that are in use give the logits of the published one.

Source: mlx-lm's and Ollama's converters, before and after they kept what predicts further tokens; transformers'
`modeling_qwen3_next` for inputs that lie in two matrices, by heads of keys.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.parity.executors import EXECUTORS, HERE, load, run
from tests.parity.test_mlx_layouts import mlx_qwen

Arrays = dict[str, np.ndarray]
Config = dict[str, Any]


def _renamed(weights: Arrays, config: Config) -> Arrays:
    """A multimodal checkpoint under MLX's names, with what predicts further tokens."""
    starts = {"model.language_model.": "language_model.model.", "model.visual.": "vision_tower."}
    made: Arrays = {}
    for name, weight in mlx_qwen(weights, config).items():
        start = next((each for each in starts if name.startswith(each)), "")
        made[starts.get(start, "language_model.") + name.removeprefix(start)] = weight
    assert "language_model.mtp.fc.weight" in made
    return made


def _experts_apart(weights: Arrays, config: Config) -> Arrays:
    experts = {name: weight for name, weight in weights.items() if ".experts." in name}
    made = mlx_qwen({name: weight for name, weight in weights.items() if name not in experts}, config)
    for name, weight in experts.items():
        stem, _, part = name.rpartition(".experts.")
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        own = np.split(weight, len(parts), axis=1)
        made |= {f"{stem}.switch_mlp.{each}.weight": rows for each, rows in zip(parts, own, strict=True)}
    return made


def _ends(config: Config, part: str) -> tuple[int, list[int]]:
    """Heads of keys, and where the parts of one of them end in a matrix of inputs."""
    keys = config["linear_num_key_heads"]
    shared = config["linear_num_value_heads"] // keys
    key, values = config["linear_key_head_dim"], shared * config["linear_value_head_dim"]
    sizes = [key, key, values, values] if part == "qkvz" else [shared, shared]
    return keys, np.cumsum(sizes)[:-1].tolist()


def _inputs_apart(weights: Arrays, config: Config) -> Arrays:
    made: Arrays = {}
    for name, weight in weights.items():
        stem, marker, part = name.removesuffix(".weight").partition("in_proj_")
        if not marker:
            made[name] = weight
            continue
        keys, ends = _ends(config, part)
        own = np.split(weight.reshape(keys, -1, weight.shape[1]), ends, axis=1)
        *first, second, last = (each.reshape(-1, weight.shape[1]) for each in own)
        names = ("qkv", "z") if part == "qkvz" else ("b", "a")
        made[f"{stem}in_proj_{names[0]}.weight"] = np.concatenate([*first, second])
        made[f"{stem}in_proj_{names[1]}.weight"] = last
    return made


def _inputs_together(weights: Arrays, config: Config) -> Arrays:
    keys, ends = _ends(config, "qkvz")
    made = {name: weight for name, weight in weights.items() if "in_proj_" not in name}
    for stem in {name.partition("in_proj_")[0] for name in weights.keys() - made.keys()}:
        qkv, z, b, a = (weights[f"{stem}in_proj_{part}.weight"] for part in ("qkv", "z", "b", "a"))
        for name, parts in {
            "qkvz": [*np.split(qkv, [keys * ends[0], keys * ends[1]]), z],
            "ba": [b, a],
        }.items():
            by_head = [part.reshape(keys, -1, part.shape[1]) for part in parts]
            made[f"{stem}in_proj_{name}.weight"] = np.concatenate(by_head, axis=1).reshape(-1, qkv.shape[1])
    return made


LAYOUTS: Mapping[str, tuple[str, Callable[[Arrays, Config], Arrays]]] = {
    "multimodal": ("qwen3_5_vision", _renamed),
    "experts apart": ("qwen3_5_moe", _experts_apart),
    "inputs apart": ("qwen3_next", _inputs_apart),
    "inputs together": ("qwen3_5", _inputs_together),
}


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_gives_the_logits_of_the_published_one(layout: str, kind: str, tmp_path: Path):
    name, convert = LAYOUTS[layout]
    config = json.loads((HERE / name / "config.json").read_text())
    weights = convert(load_file(HERE / name / "model.safetensors"), config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, tmp_path / "model.safetensors")
    executor, reference = load(tmp_path, kind), load_file(HERE / name / "reference.safetensors")
    (logits,) = run(executor, (0, 0, reference["prompt.0"].tolist()))
    executor.close()
    np.testing.assert_allclose(logits, reference["logits.0"], rtol=0, atol=1e-4)
