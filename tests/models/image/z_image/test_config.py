"""What a Z-Image pipeline's files say of it."""

import json
import shutil
from pathlib import Path

import pytest

from models.checkpoint import Checkpoint, open_checkpoint
from models.config_reader import ConfigReader
from models.errors import CheckpointError, UnsupportedArchitecture
from models.image.z_image.config import read_abilities, read_transformer_config


def changed(tiny_pipeline: Path, folder: Path, files: dict[str, dict[str, object]]) -> Checkpoint:
    """The tiny pipeline with other values in some of its JSON files."""
    shutil.copytree(tiny_pipeline, folder / "pipeline")
    for file, values in files.items():
        path = folder / "pipeline" / file
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | values))
    return open_checkpoint(str(folder / "pipeline"), folder)


SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"


@pytest.mark.parametrize(
    ("files", "turbo"),
    [
        ({SCHEDULER: {"shift": 3.0}}, True),
        ({SCHEDULER: {"shift": 6.0}}, False),
        ({SCHEDULER: {"shift": 2.0}}, False),
        ({SCHEDULER: {"use_dynamic_shifting": True}}, False),
        ({SCHEDULER: {"shift": 6.0}, INDEX: {"is_distilled": True}}, True),
        ({SCHEDULER: {"shift": 3.0}, INDEX: {"is_distilled": False}}, False),
    ],
)
def test_turbo_is_told_by_the_shift_unless_the_index_says(
    tiny_pipeline: Path, tmp_path: Path, files: dict[str, dict[str, object]], turbo: bool
):
    abilities = read_abilities(changed(tiny_pipeline, tmp_path, files))
    assert (abilities.steps, abilities.guidance) == ((9, 0.0) if turbo else (50, 5.0))
    assert abilities.takes_guidance
    assert abilities.takes_negative_prompt


def test_a_pipeline_may_name_its_defaults(tiny_pipeline: Path, tmp_path: Path):
    names = {"num_inference_steps": 20, "guidance_scale": 2.0, "width": 100, "strength": 0.75}
    abilities = read_abilities(changed(tiny_pipeline, tmp_path, {"generation_config.json": names}))
    assert (abilities.steps, abilities.guidance, abilities.strength) == (20, 2.0, 0.75)
    # Rounded down to whole tokens; what is not named is as ever.
    assert (abilities.width, abilities.height, abilities.size_multiple) == (96, 64, 16)


def test_a_default_of_the_wrong_kind_is_refused_by_name(tiny_pipeline: Path, tmp_path: Path):
    checkpoint = changed(tiny_pipeline, tmp_path, {"generation_config.json": {"num_inference_steps": "many"}})
    with pytest.raises(CheckpointError, match="num_inference_steps"):
        read_abilities(checkpoint)


def test_sizes_that_are_not_said_are_those_of_the_published_model():
    config = read_transformer_config(ConfigReader({}))
    assert (config.dim, config.num_layers, config.num_heads, config.head_dim) == (3840, 30, 30, 128)
    assert (config.mlp_dim, config.time_dim, config.axes_dims) == (10240, 256, (32, 48, 48))


@pytest.mark.parametrize(
    ("values", "error", "named"),
    [
        ({"all_patch_size": [4]}, UnsupportedArchitecture, "patches"),
        ({"all_f_patch_size": [2]}, UnsupportedArchitecture, "patches"),
        ({"siglip_feat_dim": 1152}, UnsupportedArchitecture, "Omni"),
        ({"n_kv_heads": 10}, CheckpointError, "n_kv_heads"),
        ({"dim": 3841}, CheckpointError, "n_heads"),
        ({"axes_dims": [32, 48, 40]}, CheckpointError, "axes_dims"),
        ({"axes_dims": [33, 47, 48]}, CheckpointError, "axes_dims"),
        ({"axes_dims": [64, 64]}, CheckpointError, "axes_dims"),
        ({"n_layers": 0}, CheckpointError, "n_layers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values: dict[str, object], error: type[Exception], named: str):
    with pytest.raises(error, match=named):
        read_transformer_config(ConfigReader(values))
