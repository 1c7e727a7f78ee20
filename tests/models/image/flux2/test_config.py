"""FLUX.2 klein's configuration files: what is read, and what is refused with its name."""

import json
import shutil
from pathlib import Path

import pytest

from models.checkpoint import open_checkpoint
from models.config_reader import ConfigReader
from models.errors import CheckpointError, ModelError, UnsupportedArchitecture
from models.image.base import LoadChoices
from models.image.flux2.autoencoder import build_autoencoder
from models.image.flux2.config import is_distilled, read_transformer_config
from models.image.flux2.pipeline import FAMILY, load_pipeline

KLEIN_4B = {
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
}
FOLDER = Path(__file__).parents[3] / "parity_image" / "flux2_klein"


def read(**changes: object):
    return read_transformer_config(ConfigReader(KLEIN_4B | changes, "transformer/config.json"))


def test_the_published_configuration_is_read():
    config = read()
    assert (config.dim, config.mlp_dim, config.text_dim, config.channels) == (3072, 9216, 7680, 128)
    assert (config.num_double_layers, config.num_single_layers) == (5, 20)
    assert (config.time_dim, config.theta, config.eps) == (256, 2000.0, 1e-6)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"guidance_embeds": True}, UnsupportedArchitecture, "guidance_embeds"),
        ({"guidance_embeds": None}, UnsupportedArchitecture, "guidance_embeds"),
        ({"patch_size": 2}, UnsupportedArchitecture, "patch_size"),
        ({"out_channels": 64}, UnsupportedArchitecture, "out_channels"),
        ({"axes_dims_rope": [32, 32, 32]}, CheckpointError, "axes_dims_rope [32, 32, 32] must be four even"),
        ({"axes_dims_rope": [32, 32, 32, 30]}, CheckpointError, "add up to 128"),
        ({"axes_dims_rope": [33, 31, 32, 32]}, CheckpointError, "even numbers"),
        ({"timestep_guidance_channels": 255}, CheckpointError, "timestep_guidance_channels must be even"),
        ({"num_layers": 0}, CheckpointError, "num_layers"),
    ],
    ids=str,
)
def test_what_is_not_klein_is_refused_by_name(changes, kind, words):
    with pytest.raises(kind) as caught:
        read(**changes)
    assert words in str(caught.value)


def copied(folder: Path, **index: object) -> Path:
    shutil.copytree(FOLDER, folder)
    file = folder / "model_index.json"
    values = json.loads(file.read_text()) | index
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("index", "distilled"),
    [
        ({"is_distilled": True}, True),
        ({"is_distilled": False}, False),
        ({"is_distilled": None}, False),
        ({"is_distilled": None, "_class_name": None, "architecture": "Flux2KleinPipeline"}, True),
        ({"is_distilled": False, "_class_name": None, "architecture": "Flux2KleinPipeline"}, False),
    ],
)
def test_the_index_tells_the_distilled_model_from_the_base(tmp_path, index, distilled):
    checkpoint = open_checkpoint(str(copied(tmp_path / "klein", **index)), tmp_path)
    assert is_distilled(checkpoint) == distilled
    abilities = FAMILY.abilities(checkpoint)
    assert (abilities.steps, abilities.guidance) == ((4, 0.0) if distilled else (50, 4.0))
    assert abilities.takes_guidance == abilities.takes_negative_prompt == (not distilled)
    assert (abilities.width, abilities.height, abilities.size_multiple) == (1024, 1024, 16)
    assert abilities.max_images == 10
    assert not abilities.takes_strength


def test_an_index_that_answers_neither_yes_nor_no_is_refused(tmp_path):
    checkpoint = open_checkpoint(str(copied(tmp_path / "klein", is_distilled="yes")), tmp_path)
    with pytest.raises(CheckpointError, match=r"model_index\.json: is_distilled must be true or false"):
        is_distilled(checkpoint)


def test_an_autoencoder_with_other_patches_is_refused():
    with pytest.raises(UnsupportedArchitecture, match="patches of 2 x 2"):
        build_autoencoder(ConfigReader({"patch_size": [1, 1]}))


@pytest.mark.parametrize(
    ("component", "changes", "words"),
    [
        ("transformer", {"in_channels": 64}, "in_channels is 64, and the autoencoder makes 32"),
        ("transformer", {"joint_attention_dim": 64}, "joint_attention_dim is 64, and the text encoder makes 48"),
        ("transformer", {"num_layers": 3}, "transformer_blocks.2"),
        ("text_encoder", {"num_hidden_layers": 27}, "27 layers are too few"),
        ("scheduler", {"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
    ],
    ids=str,
)
def test_components_that_do_not_fit_together_are_refused(tmp_path, component, changes, words):
    folder = copied(tmp_path / "klein")
    file = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError) as caught:
        load_pipeline(open_checkpoint(str(folder), tmp_path), LoadChoices())
    assert words in str(caught.value)
