from collections.abc import Mapping
from typing import Any

import pytest

from models.errors import CheckpointError
from models.ops import weights_in
from models.vision import PLACE, Vision
from models.vision.nemotron_omni import FAMILY
from tests.models.arch.declared import NEMOTRON_H
from tests.models.vision.folders import Folder, blank

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_experts_per_tok": 1,
    "n_routed_experts": 2,
    "moe_intermediate_size": 8,
    "vocab_size": 20,
    **NEMOTRON_H,
}
VISION = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 2, "max_img_size": 8}
IMAGES = {"patch_size": 2, "min_num_patches": 8, "max_num_patches": 40}
TOKENS = {"<img>": [17], "</img>": [18]}


def omni(
    vision: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **said: Any,
) -> Vision:
    config = {
        "architectures": ["NemotronH_Omni_Reasoning_V3"],
        "llm_config": TEXT | dict(text or {}),
        "vision_config": VISION | dict(vision or {}),
        "vit_hidden_size": 16,
        "img_context_token_id": 9,
        **said,
    }
    files = {"preprocessor_config.json": IMAGES | dict(images or {})}
    return FAMILY.build(Folder(config, files), lambda word: TOKENS.get(word, []))


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(7, 9, 4, 6), (1, 1, 4, 4), (60, 60, 6, 6), (1, 900, 2, 20), (900, 1, 20, 2)],
)
def test_a_picture_keeps_its_size_as_far_as_the_limits_allow(height: int, width: int, rows: int, columns: int):
    prepared = omni().prepare(blank(height, width))
    assert prepared.expansion == (17, *(PLACE,) * (rows * columns // 4), 18)
    assert prepared.patches == rows * columns + 10


def test_the_towers_own_tokens_are_in_front_without_patch_and_position():
    (given,) = omni().prepare(blank(8, 8)).passes
    own = slice(0, 10)
    assert given["own"][own].tolist() == list(range(10))
    assert given["is_own"][own].all()
    assert not given["is_own"][10:].any()
    assert not given["patches"][own].any()
    assert not any(given[f"share.{corner}"][own].any() for corner in range(4))
    assert given["kept"].tolist() == list(range(10, len(given["patches"])))


def test_the_positions_are_stretched_to_the_longer_side():
    # Rows and columns of a picture that is wider than the square: its last column has the square's last.
    (given,) = omni().prepare(blank(7, 15)).passes
    kept = given["kept"]
    nearest = [int(given[f"corner.{corner}"][kept].max()) for corner in range(4)]
    rows = {corner // 4 for corner in given["corner.3"][kept].tolist()}
    assert max(nearest) % 4 == 3
    assert max(rows) < 3


def test_a_norm_is_behind_the_tower_where_the_text_model_predicts_further_tokens():
    def names(vision: Vision) -> set[str]:
        return {name for weight in weights_in(vision.tower.weights) for name, _ in weight.tensors()}

    more = names(omni(text={"num_nextn_predict_layers": 1})) - names(omni())
    assert more == {f"vision_projector.vision_final_layernorm.{part}" for part in ("weight", "bias")}


def test_the_placeholder_is_looked_up_by_whatever_else_looks_tokens_up():
    assert omni().filler == 9
    assert omni(img_context_token_id=99).filler == 0


@pytest.mark.parametrize(
    ("vision", "images", "said", "reason"),
    [
        ({"num_attention_heads": 3}, {}, {}, "no 3 heads"),
        ({"use_swiglu_ffn": True}, {}, {}, "use_swiglu_ffn"),
        ({"qkv_bias": False}, {}, {}, "qkv_bias"),
        ({"layerscale_value": 0.5}, {}, {}, "layerscale_value"),
        ({"hidden_act": "mish"}, {}, {}, "hidden_act 'mish'"),
        ({}, {"patch_size": 4}, {}, "not config.json's"),
        ({}, {"downsample_ratio": 1.0}, {}, "not config.json's"),
        ({}, {}, {"vit_hidden_size": 8}, "vision_hidden_size is 8"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    vision: dict[str, Any], images: dict[str, Any], said: dict[str, Any], reason: str
):
    with pytest.raises(CheckpointError, match=reason):
        omni(vision, images, **said)
