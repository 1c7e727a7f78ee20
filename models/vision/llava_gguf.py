"""LLaVA 1.5's tower in a projector file.

Source: llama.cpp `tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py`, `llava_surgery.py` and
`tools/mtmd/clip.cpp`, which pads pictures to squares as LLaVA's own code does.
"""

from collections.abc import Mapping

from models.config_reader import JSON
from models.gguf_metadata import GGUFMetadata
from models.vision import pixtral_gguf
from models.vision.gguf import Config, ProjectorLayout, Tokens, clip_layers, pixel_rules, vision_dims
from models.vision.processing import CLIP_MEAN, CLIP_STD

_TOWER = "vision_tower.vision_model."
_NAMES = {
    "v.class_embd": f"{_TOWER}embeddings.class_embedding",
    "v.patch_embd": f"{_TOWER}embeddings.patch_embedding",
    "v.position_embd": f"{_TOWER}embeddings.position_embedding",
    "v.pre_ln": f"{_TOWER}pre_layrnorm",
    **clip_layers(_TOWER),
    "mm.0": "multi_modal_projector.linear_1",
    "mm.2": "multi_modal_projector.linear_2",
}
_MEAN: list[JSON] = [*CLIP_MEAN]
_STD: list[JSON] = [*CLIP_STD]


def _config(metadata: GGUFMetadata, tokens: Tokens) -> Config:
    vision: Config = vision_dims(metadata) | {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu" if metadata.flag("use_gelu") else "quick_gelu",
        "image_size": metadata.count("vision.image_size"),
        "layer_norm_eps": metadata.real("vision.attention.layer_norm_epsilon") or 1e-5,
    }
    return {
        "vision_config": vision,
        # It only fills places, and most vocabularies have none.
        "image_token_index": tokens("<image>") or 0,
        "multimodal_projector_bias": "mm.0.bias" in metadata.shapes,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": _feature_layers(metadata),
        "vision_feature_select_strategy": "default",
    }


def _feature_layers(metadata: GGUFMetadata) -> JSON:
    """Those that the file names, else the last: the converter leaves out the layers behind those that count."""
    layers = metadata.integers("vision.feature_layer")
    return list(layers) if layers else -1


def _files(metadata: GGUFMetadata) -> Mapping[str, Config]:
    side = metadata.count("vision.image_size")
    rules = pixel_rules(metadata, resample=3, mean=_MEAN, std=_STD)
    return {
        "preprocessor_config.json": rules
        | {
            "crop_size": {"height": side, "width": side},
            "do_center_crop": True,
            "do_pad": True,
            "image_processor_type": "LlavaImageProcessor",
            "size": {"shortest_edge": side},
        },
        "processor_config.json": {
            "patch_size": metadata.count("vision.patch_size"),
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    }


def _is_plain(metadata: GGUFMetadata) -> bool:
    """Two matrices behind a tower with a class token, and no tiles: not LLaVA 1.6, Yi's or MobileVLM's."""
    tiles = metadata.has("clip.vision.image_grid_pinpoints") or metadata.text("vision.mm_patch_merge_type")
    shapes = metadata.shapes
    others = ("mm.1.weight", "mm.3.weight", "model.image_newline")
    has = all(name in shapes for name in ("v.class_embd", "mm.0.weight", "mm.2.weight"))
    return has and not tiles and not any(name in shapes for name in others)


LAYOUTS = (
    *pixtral_gguf.PIXTRAL,
    ProjectorLayout(
        hf="LlavaForConditionalGeneration",
        model_type="llava",
        texts=("llama", "qwen2"),
        types=("mlp",),
        applies=_is_plain,
        names=_NAMES,
        unused=("v.post_ln.",),
        width=("mm.2.weight", 0),
        config=_config,
        files=_files,
    ),
)
