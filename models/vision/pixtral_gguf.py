"""Pixtral's tower in GGUF files: of Mistral 3, and of Pixtral itself.

Source: llama.cpp `conversion/llava.py`, LlavaVisionModel, `conversion/pixtral.py` and `tools/mtmd/clip.cpp`; Ollama
v0.24.0 `convert/convert_mistral.go` and `model/models/mistral3`. What these do not say is as published checkpoints
have it.
"""

from collections.abc import Callable, Mapping
from functools import partial

from models.config_reader import JSON
from models.gguf_metadata import GGUFMetadata
from models.vision.gguf import PROJECTOR, Config, ProjectorLayout, Tokens, has_tower, pixel_rules, vision_dims
from models.vision.processing import CLIP_MEAN, CLIP_STD

_BLOCK = "vision_tower.transformer.layers.{n}."
_BEHIND = "multi_modal_projector."
_LLAMA_CPP = {
    "v.patch_embd": "vision_tower.patch_conv",
    "v.pre_ln": "vision_tower.ln_pre",
    "v.blk.{n}.ln1": f"{_BLOCK}attention_norm",
    "v.blk.{n}.ln2": f"{_BLOCK}ffn_norm",
    "v.blk.{n}.attn_q": f"{_BLOCK}attention.q_proj",
    "v.blk.{n}.attn_k": f"{_BLOCK}attention.k_proj",
    "v.blk.{n}.attn_v": f"{_BLOCK}attention.v_proj",
    "v.blk.{n}.attn_out": f"{_BLOCK}attention.o_proj",
    "v.blk.{n}.ffn_gate": f"{_BLOCK}feed_forward.gate_proj",
    "v.blk.{n}.ffn_up": f"{_BLOCK}feed_forward.up_proj",
    "v.blk.{n}.ffn_down": f"{_BLOCK}feed_forward.down_proj",
    "mm.input_norm": f"{_BEHIND}norm",
    "mm.patch_merger": f"{_BEHIND}patch_merger.merging_layer",
    "mm.1": f"{_BEHIND}linear_1",
    "mm.2": f"{_BEHIND}linear_2",
}
_OLLAMA = {
    "v.patch_conv": "vision_tower.patch_conv",
    "v.encoder_norm": "vision_tower.ln_pre",
    "v.blk.{n}.attn_norm": f"{_BLOCK}attention_norm",
    "v.blk.{n}.ffn_norm": f"{_BLOCK}ffn_norm",
    "v.blk.{n}.attn_q": f"{_BLOCK}attention.q_proj",
    "v.blk.{n}.attn_k": f"{_BLOCK}attention.k_proj",
    "v.blk.{n}.attn_v": f"{_BLOCK}attention.v_proj",
    "v.blk.{n}.attn_output": f"{_BLOCK}attention.o_proj",
    "v.blk.{n}.ffn_gate": f"{_BLOCK}feed_forward.gate_proj",
    "v.blk.{n}.ffn_up": f"{_BLOCK}feed_forward.up_proj",
    "v.blk.{n}.ffn_down": f"{_BLOCK}feed_forward.down_proj",
    "mm.norm": f"{_BEHIND}norm",
    "mm.patch_merger.merging_layer": f"{_BEHIND}patch_merger.merging_layer",
    "mm.linear_1": f"{_BEHIND}linear_1",
    "mm.linear_2": f"{_BEHIND}linear_2",
}
_MERGER = "mm.patch_merger.weight"


def _merge(metadata: GGUFMetadata, *, default: int) -> int:
    said = metadata.integer("vision.spatial_merge_size") or metadata.integer("spatial_merge_size")
    return said or default


def _config(metadata: GGUFMetadata, tokens: Tokens, *, bias: str, merge: int) -> Config:
    dims = vision_dims(metadata)
    heads, width = metadata.count("vision.attention.head_count"), metadata.count("vision.embedding_length")
    # A projector file has one rope, that of its tower.
    theta = metadata.real("rope.freq_base" if metadata.arch == PROJECTOR else "vision.rope.freq_base")
    return {
        "vision_config": dims
        | {
            "model_type": "pixtral",
            "head_dim": metadata.integer("vision.attention.key_length") or width // heads,
            "hidden_act": "gelu" if metadata.flag("use_gelu") else "silu",
            "image_size": metadata.count("vision.image_size"),
            "rope_theta": theta or 10000.0,
        },
        "image_token_index": tokens("[IMG]") or 0,
        "multimodal_projector_bias": bias in metadata.shapes,
        "projector_hidden_act": metadata.text("mm.projector_hidden_act") or "gelu",
        "spatial_merge_size": _merge(metadata, default=merge),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _files(metadata: GGUFMetadata, *, merge: int) -> Mapping[str, Config]:
    patch = metadata.count("vision.patch_size")
    rules = pixel_rules(metadata, resample=3, mean=list(CLIP_MEAN), std=list(CLIP_STD))
    longest = metadata.integer("vision.longest_edge") or metadata.count("vision.image_size")
    return {
        "preprocessor_config.json": rules
        | {
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": {"height": patch, "width": patch},
            "size": {"longest_edge": longest},
        },
        "processor_config.json": {
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_token": "[IMG]",
            "patch_size": patch,
            "processor_class": "PixtralProcessor",
            "spatial_merge_size": _merge(metadata, default=merge),
        },
    }


def _as_mistral(config: Mapping[str, JSON]) -> Config:
    """Of the older files, whose text model is called a Llama; it has no window that they do not say."""
    if config.get("model_type") == "ministral3":
        return dict(config)
    return {"sliding_window": None, **config, "model_type": "mistral"}


def _merges(metadata: GGUFMetadata) -> bool:
    return _MERGER in metadata.shapes


def _merges_not(metadata: GGUFMetadata) -> bool:
    return _MERGER not in metadata.shapes


def _projector(hf: str, model_type: str, applies: Callable[[GGUFMetadata], bool], *texts: str) -> ProjectorLayout:
    return ProjectorLayout(
        hf=hf,
        model_type=model_type,
        texts=texts,
        types=("pixtral",),
        applies=applies,
        names=_LLAMA_CPP,
        interleaved=("attn_q", "attn_k"),
        # It is among the text model's embeddings.
        unused=("v.token_embd.img_break",),
        width=("mm.2.weight", 0),
        config=partial(_config, bias="mm.1.bias", merge=1),
        files=partial(_files, merge=1),
        text=_as_mistral,
    )


MISTRAL3 = (
    _projector("Mistral3ForConditionalGeneration", "mistral3", _merges, "mistral3", "llama"),
    ProjectorLayout(
        hf="Mistral3ForConditionalGeneration",
        model_type="mistral3",
        texts=("mistral3",),
        applies=has_tower,
        names=_OLLAMA,
        width=("mm.linear_2.weight", 0),
        config=partial(_config, bias="mm.linear_1.bias", merge=2),
        files=partial(_files, merge=2),
        text=_as_mistral,
    ),
)
PIXTRAL = (_projector("LlavaForConditionalGeneration", "llava", _merges_not, "llama"),)
