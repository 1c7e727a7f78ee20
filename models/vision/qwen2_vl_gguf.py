"""Qwen2-VL's tower in a projector file.

Source: llama.cpp `conversion/qwenvl.py`, Qwen2VLVisionModel, `tools/mtmd/clip.cpp` and `tools/mtmd/models/qwen2vl.cpp`.
What an MLP is wide is read from its matrices: the converter writes the text model's width as `feed_forward_length`, and
the one before it 0. The norms' epsilon is the published one, as in Hugging Face's tower, whatever a file says.
"""

from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.vision.gguf import Config, ProjectorLayout, Tokens
from models.vision.qwen_gguf import (
    BLOCK,
    PATCHES,
    QKV,
    activation_of,
    frames_of,
    merge_of,
    older_files,
    shape_of,
    token_ids,
)

_NAMES = {
    "v.blk.{n}.ln1": f"{BLOCK}norm1",
    "v.blk.{n}.ln2": f"{BLOCK}norm2",
    "v.blk.{n}.attn_out": f"{BLOCK}attn.proj",
    "v.blk.{n}.ffn_up": f"{BLOCK}mlp.fc1",
    "v.blk.{n}.ffn_down": f"{BLOCK}mlp.fc2",
    "v.post_ln": "visual.merger.ln_q",
    "mm.0": "visual.merger.mlp.0",
    "mm.2": "visual.merger.mlp.2",
}


def _config(metadata: GGUFMetadata, tokens: Tokens) -> Config:
    if every := metadata.integer("vision.n_wa_pattern"):
        raise CheckpointError(f"clip.vision.n_wa_pattern = {every} is not supported by a Qwen2-VL", file=metadata.file)
    width = metadata.count("vision.embedding_length")
    # One of the two is the width, whichever of the older names the matrix has.
    inner = max(shape_of(metadata, "v.blk.0.ffn_up.weight"))
    if inner % width:
        raise CheckpointError(f"an MLP of {inner} is no multiple of the width {width}", file=metadata.file)
    patch = metadata.count("vision.patch_size")
    vision: Config = {
        "model_type": "qwen2_vl",
        "depth": metadata.count("vision.block_count"),
        "embed_dim": width,
        "hidden_act": activation_of(metadata),
        "hidden_size": shape_of(metadata, "mm.2.weight")[0],
        "in_chans": metadata.integer("vision.num_channels") or 3,
        "mlp_ratio": inner // width,
        "num_heads": metadata.count("vision.attention.head_count"),
        "patch_size": patch,
        "spatial_merge_size": merge_of(metadata),
        "spatial_patch_size": patch,
        "temporal_patch_size": frames_of(metadata),
    }
    return {"vision_config": vision} | token_ids(tokens)


LAYOUTS = (
    ProjectorLayout(
        hf="Qwen2VLForConditionalGeneration",
        model_type="qwen2_vl",
        texts=("qwen2vl",),
        types=("qwen2vl_merger",),
        names=_NAMES,
        made=(*QKV, PATCHES),
        # An older converter writes a table of positions that nobody learned.
        unused=("v.position_embd.",),
        width=("mm.2.weight", 0),
        config=_config,
        files=older_files,
    ),
)
