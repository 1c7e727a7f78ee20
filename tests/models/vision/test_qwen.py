"""What the families of Qwens that see declare, what they make ready, and what they refuse."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from models.errors import CheckpointError
from models.ops import weights_in
from models.vision import PLACE, PictureError, Vision, family_of
from tests.models.vision.folders import Folder, blank

FIRST, FLAT, DEEP, MIXED, LATEST = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
)
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 20,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "rope_scaling": {"mrope_section": [1, 1, 2]},
}
TOWER = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_heads": 3,
    "out_hidden_size": 16,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "num_position_embeddings": 16,
}
EARLIER = {"depth": 3, "embed_dim": 24, "mlp_ratio": 2, "hidden_size": 16, "num_heads": 3, "patch_size": 4}
PROCESSOR = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "min_pixels": 64, "max_pixels": 4096}
TOKENS = {"<|vision_start|>": [12], "<|vision_end|>": [13], "<|image_pad|>": [14]}


def vision(architecture: str, tower: Mapping[str, Any] | None = None, **processor: Any) -> Vision:
    sizes = EARLIER if architecture == FIRST else TOWER
    config = {"architectures": [architecture], "text_config": TEXT, "vision_config": sizes | dict(tower or {})}
    files = Folder(config, {"preprocessor_config.json": PROCESSOR | processor})
    family = family_of(files)
    assert family is not None
    return family.build(files, TOKENS.__getitem__)


def shapes(made: Vision) -> dict[str, tuple[int, ...]]:
    return dict(tensor for weight in weights_in(made.tower.weights) for tensor in weight.tensors())


@pytest.mark.parametrize("architecture", [FIRST, FLAT, DEEP, MIXED, LATEST])
def test_a_picture_stands_between_two_tokens_and_its_windows_in_a_grid(architecture: str):
    prepared = vision(architecture).prepare(blank(24, 40))
    assert prepared.expansion == (12, *(PLACE,) * 15, 13)
    assert prepared.grid == (3, 5)
    assert prepared.patches == 60
    (given,) = prepared.passes
    # Once, though a patch holds several frames.
    assert given["patches"].shape == (60, 3 * 4 * 4)
    assert given["angles"].shape == (60, 4)


@pytest.mark.parametrize("architecture", [FLAT, DEEP, LATEST])
def test_a_picture_too_long_for_its_width_is_refused_in_words(architecture: str):
    with pytest.raises(PictureError, match=r"1000 x 4 pixels: one side may be at most 200 times the other"):
        vision(architecture).prepare(blank(4, 1000))


def test_the_patches_of_a_window_are_consecutive_and_turn_by_their_row_and_column():
    angles = vision(DEEP).prepare(blank(16, 16)).passes[0]["angles"]
    # The first frequency of each axis is 1, so the angle is the row, or the column.
    assert angles[:8, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert angles[:8, 2].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    np.testing.assert_allclose(angles[:, 1], angles[:, 0] / 100, rtol=1e-6)


def test_patches_lie_square_by_square_and_rows_are_put_back():
    pixels = np.zeros((24, 40, 3), np.uint8)
    # Each window of 8 x 8 pixels has a shade of its own.
    pixels[...] = (np.arange(3)[:, None] * 5 + np.arange(5)).repeat(8, 0).repeat(8, 1)[..., None] * 10
    (given,) = vision(FLAT, do_normalize=False).prepare(pixels).passes
    shades = (given["patches"].reshape(15, -1).mean(axis=1) * 25.5).round().astype(int).tolist()
    assert shades == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert given["squares"].tolist() == [16, 16, 8, 8, 8, 4]
    assert [shades[place] for place in given["back"]] == list(range(15))


def test_learned_positions_are_stretched_from_corner_to_corner():
    (given,) = vision(DEEP).prepare(blank(16, 56)).passes
    shares = np.stack([given[f"share.{corner}"] for corner in range(4)])
    assert shares.shape == (4, 4 * 14, 1)
    np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-6)
    corners = np.stack([given[f"corner.{corner}"] for corner in range(4)])
    assert corners.dtype == np.int64
    assert (corners.min(), corners.max()) == (0, 15)
    # A square of 4 x 4 over 4 x 14 patches: rows fall on rows, and columns between.
    exact = (corners * shares[..., 0]).sum(axis=0)
    np.testing.assert_allclose(exact[[0, 1, 2, -1]], [0, 3 / 13, 4, 15], rtol=1e-5)


def test_towers_declare_what_their_files_have():
    flat, deep = shapes(vision(FLAT)), shapes(vision(DEEP, {"deepstack_visual_indexes": [0, 2]}))
    assert flat["visual.patch_embed.proj.weight"] == deep["visual.patch_embed.proj.weight"] == (24, 3, 2, 4, 4)
    assert "visual.patch_embed.proj.bias" not in flat
    assert flat["visual.blocks.2.attn.qkv.bias"] == deep["visual.blocks.2.attn.qkv.bias"] == (72,)
    assert flat["visual.blocks.0.mlp.gate_proj.bias"] == (28,)
    assert flat["visual.merger.mlp.2.weight"] == deep["visual.merger.linear_fc2.weight"] == (16, 96)
    assert deep["visual.merger.norm.weight"] == (24,)
    assert deep["visual.deepstack_merger_list.1.norm.bias"] == (96,)
    assert deep["visual.pos_embed.weight"] == (16, 24)


def test_of_exits_there_are_as_many_as_the_config_names():
    assert vision(DEEP, {"deepstack_visual_indexes": [0, 2]}).tower.deep == 2
    assert vision(MIXED).tower.deep == vision(FLAT).tower.deep == vision(LATEST).tower.deep == 0


@pytest.mark.parametrize(
    ("architecture", "tower", "named"),
    [
        (FIRST, {"hidden_size": 32}, "hidden_size is 32, and the text model's width 16"),
        (FIRST, {"hidden_act": "spline"}, "hidden_act 'spline' is not supported"),
        (FLAT, {"window_size": 7}, "window_size is less than a window"),
        (FLAT, {"out_hidden_size": 32}, "out_hidden_size is 32, and the text model's width 16"),
        (FLAT, {"hidden_act": "spline"}, "hidden_act 'spline' is not supported"),
        (FLAT, {"in_chans": 1}, "in_channels other than 3"),
        (FLAT, {"num_heads": 5}, "5 heads cannot share a width of 24"),
        (DEEP, {"num_heads": 12}, "12 heads cannot share a width of 24 in fours"),
        (DEEP, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' of a vision tower"),
        (DEEP, {"deepstack_visual_indexes": [2, 0]}, r"deepstack_visual_indexes \[2, 0\] names no layers in order"),
        (DEEP, {"deepstack_visual_indexes": [3]}, r"deepstack_visual_indexes \[3\] names no layers"),
        (DEEP, {"depth": None}, "depth is missing"),
        (LATEST, {"deepstack_visual_indexes": [1]}, r"deepstack_visual_indexes \[1\] is not supported"),
    ],
)
def test_what_makes_no_sense_or_is_not_honoured_is_refused(architecture: str, tower: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=f"config.json.*{named}"):
        vision(architecture, tower)
