"""Qwen3-VL's tower in GGUF files, and Qwen3.5's, which is one without rows from several depths.

Source: llama.cpp `conversion/qwen3vl.py`, Qwen3VLVisionModel, `gguf-py/gguf/constants.py`, `tools/mtmd/clip.cpp` and
`tools/mtmd/models/qwen3vl.cpp`, which Ollama's converter writes for as well since v0.30; for its one file before that
Ollama v0.24.0 `convert/convert_qwen3vl.go`, `convert/convert_qwen3next.go` and `model/models/qwen3vl`. What these do
not say is as published checkpoints have it; the norms' epsilon is that, as in Hugging Face's tower, whatever a file
says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.config_reader import JSON
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.vision.gguf import PROJECTOR, Config, Made, ProjectorLayout, Tokens, has_tower, numbers_in
from models.vision.qwen_gguf import (
    BLOCK,
    PATCHES,
    QKV,
    activation_of,
    files_of,
    frames_of,
    merge_of,
    shape_of,
    token_ids,
)

_EXITS = "v.deepstack."
_MERGER, _DEEP = "visual.merger.", "visual.deepstack_merger_list.{n}."
_LLAMA_CPP = {
    "v.patch_embd": "visual.patch_embed.proj",
    "v.position_embd": "visual.pos_embed",
    "v.blk.{n}.ln1": f"{BLOCK}norm1",
    "v.blk.{n}.ln2": f"{BLOCK}norm2",
    "v.blk.{n}.attn_qkv": f"{BLOCK}attn.qkv",
    "v.blk.{n}.attn_out": f"{BLOCK}attn.proj",
    "v.blk.{n}.ffn_up": f"{BLOCK}mlp.linear_fc1",
    "v.blk.{n}.ffn_down": f"{BLOCK}mlp.linear_fc2",
    "v.deepstack.{n}.norm": f"{_DEEP}norm",
    "v.deepstack.{n}.fc1": f"{_DEEP}linear_fc1",
    "v.deepstack.{n}.fc2": f"{_DEEP}linear_fc2",
    "v.post_ln": f"{_MERGER}norm",
    "mm.0": f"{_MERGER}linear_fc1",
    "mm.2": f"{_MERGER}linear_fc2",
}
_OLLAMA = {
    "v.patch_embed": "visual.patch_embed.proj",
    "v.pos_embed": "visual.pos_embed",
    "v.blk.{n}.norm1": f"{BLOCK}norm1",
    "v.blk.{n}.norm2": f"{BLOCK}norm2",
    "v.blk.{n}.attn_out": f"{BLOCK}attn.proj",
    "v.blk.{n}.mlp.linear_fc1": f"{BLOCK}mlp.linear_fc1",
    "v.blk.{n}.mlp.linear_fc2": f"{BLOCK}mlp.linear_fc2",
    "v.deepstack_merger.{n}.norm": f"{_DEEP}norm",
    "v.deepstack_merger.{n}.linear_fc1": f"{_DEEP}linear_fc1",
    "v.deepstack_merger.{n}.linear_fc2": f"{_DEEP}linear_fc2",
    "v.merger.norm": f"{_MERGER}norm",
    "v.merger.linear_fc1": f"{_MERGER}linear_fc1",
    "v.merger.linear_fc2": f"{_MERGER}linear_fc2",
}
_CHANNELS = 3
_FOLDED = Made("visual.patch_embed.proj.weight", ("v.patch_embed.weight",), within=_CHANNELS)
_HALF: list[JSON] = [0.5, 0.5, 0.5]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The matrices whose shapes say what no key does."""

    positions: str
    up: str
    last: str

    def config(self, metadata: GGUFMetadata, tokens: Tokens) -> Config:
        """See `ProjectorLayout.config`."""
        positions = shape_of(metadata, self.positions)[0]
        if math.isqrt(positions) ** 2 != positions:
            raise CheckpointError(f"{positions} positions are no square", file=metadata.file, tensor=self.positions)
        in_projector = metadata.arch == PROJECTOR
        vision: Config = {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": list(_exits(metadata) if in_projector else _named_exits(metadata)),
            "depth": metadata.count("vision.block_count"),
            "hidden_act": activation_of(metadata) if in_projector else "gelu_pytorch_tanh",
            "hidden_size": metadata.count("vision.embedding_length"),
            "in_channels": metadata.integer("vision.num_channels") or _CHANNELS,
            "intermediate_size": shape_of(metadata, self.up)[0],
            "num_heads": metadata.count("vision.attention.head_count"),
            "num_position_embeddings": positions,
            "out_hidden_size": shape_of(metadata, self.last)[0],
            "patch_size": metadata.count("vision.patch_size"),
            "rope_theta": metadata.real("vision.rope.freq_base") or 10000.0,
            "spatial_merge_size": merge_of(metadata),
            "temporal_patch_size": frames_of(metadata),
        }
        return {"vision_config": vision} | token_ids(tokens)


def _exits(metadata: GGUFMetadata) -> Sequence[int]:
    """The layers behind which rows are made, which tensors are named by."""
    found = numbers_in(metadata, _EXITS)
    flags = metadata.flags("vision.is_deepstack_layers", metadata.count("vision.block_count"))
    said = found if flags is None else [layer for layer, flag in enumerate(flags) if flag]
    if said != found:
        raise CheckpointError(
            f"its metadata has clip.vision.is_deepstack_layers for the layers {said}, and tensors for {found}",
            file=metadata.file,
        )
    return found


def _named_exits(metadata: GGUFMetadata) -> Sequence[int]:
    """The same where tensors are counted."""
    return metadata.integers("vision.deepstack_visual_indexes") or []


def _files(metadata: GGUFMetadata) -> Mapping[str, Config]:
    least = metadata.integer("vision.image_min_pixels") or metadata.integer("vision.shortest_edge")
    most = metadata.integer("vision.image_max_pixels") or metadata.integer("vision.longest_edge")
    size: Config = {"shortest_edge": least or 65536, "longest_edge": most or 16777216}
    return files_of(metadata, mean=_HALF, std=_HALF, size={"size": size})


def _sees_alone(metadata: GGUFMetadata) -> bool:
    """Whether it does not hear too: Qwen3-Omni's do."""
    return not metadata.flag("has_audio_encoder")


def _projector(hf: str, model_type: str, text: str) -> ProjectorLayout:
    return ProjectorLayout(
        hf=hf,
        model_type=model_type,
        texts=(text,),
        types=("qwen3vl_merger",),
        applies=_sees_alone,
        names=_LLAMA_CPP,
        made=(PATCHES,),
        exits=_EXITS,
        width=("mm.2.weight", 0),
        config=_Sizes("v.position_embd.weight", "v.blk.0.ffn_up.weight", "mm.2.weight").config,
        files=_files,
    )


def _one_file(hf: str, model_type: str, text: str) -> ProjectorLayout:
    last = "v.merger.linear_fc2.weight"
    return ProjectorLayout(
        hf=hf,
        model_type=model_type,
        texts=(text,),
        applies=has_tower,
        names=_OLLAMA,
        made=(*QKV, _FOLDED),
        width=(last, 0),
        config=_Sizes("v.pos_embed.weight", "v.blk.0.mlp.linear_fc1.weight", last).config,
        files=_files,
    )


_DENSE = ("Qwen3VLForConditionalGeneration", "qwen3_vl", "qwen3vl")
_EXPERTS = ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", "qwen3vlmoe")
_LATER = ("Qwen3_5ForConditionalGeneration", "qwen3_5", "qwen35")
_LATER_EXPERTS = ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "qwen35moe")
LAYOUTS = (_projector(*_DENSE), _projector(*_EXPERTS), _one_file(*_DENSE), _one_file(*_EXPERTS))
QWEN3_5 = (_projector(*_LATER), _projector(*_LATER_EXPERTS), _one_file(*_LATER), _one_file(*_LATER_EXPERTS))
