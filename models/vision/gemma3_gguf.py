"""Gemma 3's tower in GGUF files.

Source: llama.cpp `conversion/gemma.py`, Gemma3VisionModel; Ollama v0.24.0 `convert/convert_gemma3.go`,
`convert/convert_gemma.go` and `model/models/gemma3`.
"""

import math
from collections.abc import Mapping

from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.vision.gguf import Config, ProjectorLayout, Tokens, clip_layers, has_tower, pixel_rules, vision_dims

_TOWER = "vision_tower.vision_model."
_BLOCK = f"{_TOWER}encoder.layers.{{n}}."
_PROJECTION = "multi_modal_projector.mm_input_projection_weight"
_SOFT_NORM = "multi_modal_projector.mm_soft_emb_norm"
_MERGED = 4
"""Patches along a side of a place, where a file does not say."""
_LLAMA_CPP = {
    "v.patch_embd": f"{_TOWER}embeddings.patch_embedding",
    "v.position_embd": f"{_TOWER}embeddings.position_embedding",
    "v.post_ln": f"{_TOWER}post_layernorm",
    **clip_layers(_TOWER),
    "mm.input_projection.weight": _PROJECTION,
    "mm.soft_emb_norm": _SOFT_NORM,
}
_OLLAMA = {
    "v.patch_embedding": f"{_TOWER}embeddings.patch_embedding",
    "v.position_embedding": f"{_TOWER}embeddings.position_embedding",
    "v.post_layernorm": f"{_TOWER}post_layernorm",
    "v.blk.{n}.layer_norm1": f"{_BLOCK}layer_norm1",
    "v.blk.{n}.layer_norm2": f"{_BLOCK}layer_norm2",
    "v.blk.{n}.attn_q": f"{_BLOCK}self_attn.q_proj",
    "v.blk.{n}.attn_k": f"{_BLOCK}self_attn.k_proj",
    "v.blk.{n}.attn_v": f"{_BLOCK}self_attn.v_proj",
    "v.blk.{n}.attn_output": f"{_BLOCK}self_attn.out_proj",
    "v.blk.{n}.mlp.fc1": f"{_BLOCK}mlp.fc1",
    "v.blk.{n}.mlp.fc2": f"{_BLOCK}mlp.fc2",
    "mm.mm_input_projection.weight": _PROJECTION,
    "mm.mm_soft_emb_norm": _SOFT_NORM,
}


def _places(metadata: GGUFMetadata) -> int:
    """Rows of the tower for a picture."""
    side = metadata.count("vision.image_size") // metadata.count("vision.patch_size")
    said = metadata.integer("mm.tokens_per_image") or metadata.integer("mm_tokens_per_image")
    places: int = said or (side // (metadata.integer("vision.projector.scale_factor") or _MERGED)) ** 2
    if math.isqrt(places) ** 2 != places or not 0 < places <= side**2:
        raise CheckpointError(f"{side} x {side} patches do not make {places} places", file=metadata.file)
    return places


def _config(metadata: GGUFMetadata, tokens: Tokens) -> Config:
    vision: Config = vision_dims(metadata) | {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "image_size": metadata.count("vision.image_size"),
        "layer_norm_eps": metadata.real("vision.attention.layer_norm_epsilon") or 1e-6,
        "vision_use_head": False,
    }
    return {
        "vision_config": vision,
        "mm_tokens_per_image": _places(metadata),
        "boi_token_index": tokens("<start_of_image>"),
        "eoi_token_index": tokens("<end_of_image>"),
        # It only fills places; older vocabularies end in front of it.
        "image_token_index": tokens("<image_soft_token>") or 0,
    }


def _files(metadata: GGUFMetadata) -> Mapping[str, Config]:
    side, places = metadata.count("vision.image_size"), _places(metadata)
    rules = pixel_rules(metadata, resample=2, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    return {
        "preprocessor_config.json": rules
        | {
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": places,
            "size": {"height": side, "width": side},
        },
        "processor_config.json": {"image_seq_length": places, "processor_class": "Gemma3Processor"},
    }


LAYOUTS = (
    ProjectorLayout(
        hf="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        texts=("gemma3",),
        types=("gemma3",),
        names=_LLAMA_CPP,
        norms=("mm.soft_emb_norm.weight",),
        width=("mm.input_projection.weight", 1),
        config=_config,
        files=_files,
    ),
    ProjectorLayout(
        hf="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        texts=("gemma3",),
        applies=has_tower,
        names=_OLLAMA,
        norms=("mm.mm_soft_emb_norm.weight",),
        width=("mm.mm_input_projection.weight", 1),
        config=_config,
        files=_files,
    ),
)
