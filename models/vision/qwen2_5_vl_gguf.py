"""Qwen2.5-VL's tower in GGUF files.

Source: llama.cpp `conversion/qwenvl.py`, Qwen2VLVisionModel, and `tools/mtmd/clip.cpp`; Ollama v0.24.0
`convert/convert_qwen25vl.go` and `model/models/qwen25vl`. What these do not say is as published checkpoints have it.
"""

from functools import partial

from models.config_reader import JSON
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.vision.gguf import PROJECTOR, Config, ProjectorLayout, Tokens, has_tower, vision_dims
from models.vision.qwen_gguf import BLOCK, FRAMES, PATCHES, QKV, frames, merge_of, older_files, shape_of, token_ids

_LAYER = {
    "v.blk.{n}.ln1": f"{BLOCK}norm1",
    "v.blk.{n}.ln2": f"{BLOCK}norm2",
    "v.blk.{n}.attn_out": f"{BLOCK}attn.proj",
    "v.blk.{n}.ffn_gate": f"{BLOCK}mlp.gate_proj",
    "v.blk.{n}.ffn_up": f"{BLOCK}mlp.up_proj",
    "v.blk.{n}.ffn_down": f"{BLOCK}mlp.down_proj",
}
_LLAMA_CPP = _LAYER | {
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
}
_OLLAMA = _LAYER | {
    "v.merger.ln_q": "visual.merger.ln_q",
    "v.merger.mlp.0": "visual.merger.mlp.0",
    "v.merger.mlp.2": "visual.merger.mlp.2",
}
_WHOLE = (7, 15, 23, 31)


def _config(metadata: GGUFMetadata, tokens: Tokens, *, last: str) -> Config:
    dims = vision_dims(metadata)
    patch = metadata.count("vision.patch_size")
    vision: Config = {
        "model_type": "qwen2_5_vl",
        "depth": dims["num_hidden_layers"],
        "fullatt_block_indexes": _whole_layers(metadata),
        "hidden_act": "silu",
        "hidden_size": dims["hidden_size"],
        "in_chans": dims["num_channels"],
        "intermediate_size": dims["intermediate_size"],
        "num_heads": dims["num_attention_heads"],
        "out_hidden_size": shape_of(metadata, last)[0],
        "patch_size": patch,
        "spatial_merge_size": merge_of(metadata),
        "spatial_patch_size": patch,
        "temporal_patch_size": FRAMES,
        "window_size": metadata.integer("vision.window_size") or 112,
    }
    return {"vision_config": vision} | token_ids(tokens)


def _whole_layers(metadata: GGUFMetadata) -> JSON:
    """The layers without windows."""
    depth = metadata.count("vision.block_count")
    if metadata.arch != PROJECTOR:
        # Ollama's converter leaves the usual ones out, or writes an empty list.
        return [layer for layer in metadata.integers("vision.fullatt_block_indexes") or _WHOLE if layer < depth]
    every = metadata.integer("vision.n_wa_pattern")
    if every is None:
        raise CheckpointError("its metadata has no clip.vision.n_wa_pattern", file=metadata.file)
    return [layer for layer in range(depth) if not every or (layer + 1) % every == 0]


LAYOUTS = (
    ProjectorLayout(
        hf="Qwen2_5_VLForConditionalGeneration",
        model_type="qwen2_5_vl",
        texts=("qwen2vl",),
        types=("qwen2.5vl_merger",),
        names=_LLAMA_CPP,
        made=(*QKV, PATCHES),
        width=("mm.2.weight", 0),
        config=partial(_config, last="mm.2.weight"),
        files=older_files,
    ),
    ProjectorLayout(
        hf="Qwen2_5_VLForConditionalGeneration",
        model_type="qwen2_5_vl",
        texts=("qwen25vl",),
        applies=has_tower,
        names=_OLLAMA,
        made=(*QKV, frames("v.patch_embd_0.weight", "v.patch_embd_1.weight")),
        width=("v.merger.mlp.2.weight", 0),
        config=partial(_config, last="v.merger.mlp.2.weight"),
        files=older_files,
    ),
)
