"""Checkpoints as mlx-lm converts them: other axes, other names, factors in the weights; the same logits.

Source: mlx-lm 0.32, `sanitize` of the models named.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.errors import CheckpointError
from tests.parity.executors import EXECUTORS, HERE, load, run

Arrays = dict[str, np.ndarray]
Config = dict[str, Any]
PROJECTIONS = {f"{part}_proj.weight": f"{part}_proj.weight" for part in ("gate", "up", "down")}


def _convolutions(weights: Mapping[str, np.ndarray]) -> Arrays:
    """Kernels (C, K, 1)."""
    return {name: np.moveaxis(w, 2, 1) if "conv" in name and w.ndim == 3 else w for name, w in weights.items()}


def _stacked(weights: Arrays, names: Mapping[str, str]) -> Arrays:
    """Experts in one tensor a projection, under these names by those that they had."""
    made: Arrays = {}
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, weight in weights.items():
        before, marker, after = name.partition(".experts.")
        if not marker or "shared" in before:
            made[name] = weight
            continue
        number, _, part = after.partition(".")
        found.setdefault(f"{before}.switch_mlp.{names[part]}", {})[int(number)] = weight
    return made | {name: np.stack([each[n] for n in range(len(each))]) for name, each in found.items()}


def _plain(weights: Arrays, config: Config) -> Arrays:
    return _convolutions(weights)


def _lfm2_moe(weights: Arrays, config: Config) -> Arrays:
    names = {"w1.weight": "gate_proj.weight", "w3.weight": "up_proj.weight", "w2.weight": "down_proj.weight"}
    made: Arrays = {}
    for name, weight in _stacked(_convolutions(weights), names).items():
        before, _, part = name.partition(".feed_forward.")
        made[f"{before}.feed_forward.{names[part]}" if part in names else name] = weight
    return made


def _nemotron_h(weights: Arrays, config: Config) -> Arrays:
    return _stacked(_convolutions(weights), {"up_proj.weight": "fc1.weight", "down_proj.weight": "fc2.weight"})


def _granite(weights: Arrays, config: Config) -> Arrays:
    """Of experts gate and up apart, and of the shared MLP where it is alone."""
    made: Arrays = {}
    for name, weight in _convolutions(weights).items():
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        of_experts = stem.endswith("block_sparse_moe")
        if part not in ("input_linear", "output_linear") or not (of_experts or not config["num_local_experts"]):
            made[name] = weight
            continue
        place = f"{stem}.switch_mlp" if of_experts else stem.replace("shared_mlp", "mlp")
        if part == "output_linear":
            made[f"{place}.down_proj.weight"] = weight
        else:
            parts = zip(("gate", "up"), np.split(weight, 2, axis=-2), strict=True)
            made |= {f"{place}.{each}_proj.weight": np.ascontiguousarray(own) for each, own in parts}
    return made


def _falcon_h1(weights: Arrays, config: Config) -> Arrays:
    """All factors but the keys' in the weights; that of attention's input is 1 in published models."""
    attention, (gate, down) = config.pop("attention_in_multiplier"), config["mlp_multipliers"]
    inner, shared = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    within = np.repeat(config["ssm_multipliers"], (inner, inner, shared, shared, config["mamba_n_heads"]))
    factors: dict[str, Any] = {
        "embed_tokens": config["embedding_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), attention),
        "o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
        "gate_proj": gate,
        "down_proj": down,
        "in_proj": config["ssm_in_multiplier"] * within[:, None],
    }
    return {
        name: (w * factors.get(name.removesuffix(".weight").rpartition(".")[2], 1.0)).astype(np.float32)
        for name, w in _convolutions(weights).items()
    }


def mlx_qwen(weights: Arrays, config: Config) -> Arrays:
    """1 added to the norms, but those of the delta rule's outputs; experts in a tensor a projection."""
    plain = "linear_attn.norm.weight"
    return {
        name: w + np.float32(1) if name.endswith("norm.weight") and not name.endswith(plain) else w
        for name, w in _stacked(_convolutions(weights), PROJECTIONS).items()
    }


LAYOUTS: Mapping[str, Callable[[Arrays, Config], Arrays]] = {
    "lfm2": _plain,
    "lfm2_moe": _lfm2_moe,
    "mamba2": _plain,
    "nemotron_h_moe": _nemotron_h,
    "granitemoehybrid": _granite,
    "granitemoehybrid_dense": _granite,
    "falcon_h1": _falcon_h1,
    "qwen3_next": mlx_qwen,
    "qwen3_5": mlx_qwen,
}


def converted(name: str, folder: Path) -> Path:
    """A fixture as mlx-lm would write it; it says how it is quantised, and no matrix is."""
    config = json.loads((HERE / name / "config.json").read_text())
    weights = LAYOUTS[name](load_file(HERE / name / "model.safetensors"), config)
    config["quantization"] = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_converted_checkpoint_gives_the_logits_of_the_published_one(name: str, kind: str, tmp_path: Path):
    before, after = (load_file(each / "model.safetensors") for each in (HERE / name, converted(name, tmp_path)))
    assert {key: value.shape for key, value in before.items()} != {key: value.shape for key, value in after.items()}
    executor, reference = load(tmp_path, kind), load_file(HERE / name / "reference.safetensors")
    (logits,) = run(executor, (0, 0, reference["prompt.0"].tolist()))
    executor.close()
    np.testing.assert_allclose(logits, reference["logits.0"], rtol=0, atol=1e-4)


def test_factors_in_weights_that_nothing_tells_of_are_refused(tmp_path: Path):
    config = json.loads((converted("falcon_h1", tmp_path) / "config.json").read_text())
    del config["quantization"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"conv1d\.weight: its shape is \[136, 3, 1\]"):
        load(tmp_path, "onnx")
