"""A Gemma 3 with a vision tower of the real size (SigLIP, 400M parameters) and a small decoder, random weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.ops import weights_in
from models.vision import family_of
from tests.bench.commands import REPOSITORY

TEMPLATE = REPOSITORY / "tests" / "parity_vision" / "gemma3"
"""Whose tokenizer and files of settings are taken."""
SIDE, PATCH, PLACES = 896, 14, 256
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": SIDE,
    "patch_size": PATCH,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 8192,
}
"""The shape of Gemma 3 270M but for its vocabulary."""
SCALE = 0.02
SHARD_BYTES = 512 << 20


def write(folder: Path) -> None:
    """Write the folder, in float32."""
    folder.mkdir(parents=True)
    for path in TEMPLATE.glob("*.json"):
        if not path.name.startswith(("reference", "model")):
            shutil.copy2(path, folder / path.name)
    config = json.loads((TEMPLATE / "config.json").read_text())
    config["mm_tokens_per_image"] = PLACES
    config["text_config"] |= TEXT
    config["vision_config"] |= VISION
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        settings = json.loads(path.read_text()) | {"image_seq_length": PLACES}
        if "size" in settings:
            settings["size"] = {"height": SIDE, "width": SIDE}
        path.write_text(json.dumps(settings, indent=1))
    _write_weights(folder)


def _write_weights(folder: Path) -> None:
    placed: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    for name, shape in _tensors(folder):
        shard[name] = _random(name, shape)
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            _save(folder, shard, placed)
            shard = {}
    _save(folder, shard, placed)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save(folder: Path, shard: dict[str, np.ndarray], placed: dict[str, str]) -> None:
    file = f"model-{len(set(placed.values())) + 1:05}.safetensors"
    save_file(shard, folder / file, {"format": "pt"})
    placed |= dict.fromkeys(shard, file)


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as published checkpoints have them."""
    checkpoint = open_checkpoint(str(folder), Path())
    for weight in weights_in(build_model(checkpoint.config).weights):
        yield from ((f"language_model.{name}", shape) for name, shape in weight.tensors())
    family = family_of(checkpoint)
    assert family is not None
    for weight in weights_in(family.build(checkpoint, lambda text: [1] * len(text.split())).tower.weights):
        for name, shape in weight.tensors():
            if name.endswith("mm_input_projection.weight"):
                yield name.replace(".weight", "_weight"), shape[::-1]
            else:
                yield name.replace("vision_tower.", "vision_tower.vision_model."), shape


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
    drawn = rng.standard_normal(shape, np.float32) * np.float32(SCALE)
    return drawn if len(shape) > 1 or not name.endswith("norm.weight") else drawn + np.float32("language" not in name)
