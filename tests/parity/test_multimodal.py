"""Of a multimodal checkpoint in mlx-community's layout the text part runs, with settings of its own for one matrix."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.executors.base import Executor
from tests.parity.executors import EXECUTORS, HERE, load, run

GROUP = 32
IN_EIGHT = "language_model.model.layers.0.mlp.gate_proj"
TOKENS = list(range(5, 45))


def write(folder: Path, tensors: dict[str, mx.array], **settings: object) -> Path:
    """The fixture with other tensors and settings."""
    shutil.copytree(HERE / "gemma3_vision", folder)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The text part quantised, and the same values dense; the vision tower as it is."""
    folder, quantised, dense = tmp_path_factory.mktemp("multimodal"), {}, {}
    for name, value in mx.load(str(HERE / "gemma3_vision/model.safetensors")).items():
        quantised[name] = dense[name] = value
        layer = name.removesuffix(".weight")
        if name.startswith("language_model.") and value.ndim == 2 and value.shape[1] % GROUP == 0:
            bits = 8 if layer == IN_EIGHT else 4
            parts = mx.quantize(value, GROUP, bits)
            quantised |= {name: parts[0], f"{layer}.scales": parts[1], f"{layer}.biases": parts[2]}
            dense[name] = mx.dequantize(*parts, GROUP, bits)
    exception = {IN_EIGHT: {"group_size": GROUP, "bits": 8}}
    settings = {"group_size": GROUP, "bits": 4, **exception}
    return write(folder / "quantised", quantised, quantization=settings), write(folder / "dense", dense)


def logits(executor: Executor) -> np.ndarray:
    (found,) = run(executor, (0, 0, TOKENS))
    executor.close()
    return found


@pytest.mark.parametrize("kind", EXECUTORS)
def test_the_text_part_of_a_quantised_multimodal_checkpoint_has_its_own_values(folders: tuple[Path, Path], kind: str):
    quantised, dense = folders
    np.testing.assert_allclose(logits(load(quantised, kind)), logits(load(dense, kind)), rtol=0, atol=1e-5)
