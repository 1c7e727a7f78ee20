"""A text model and its tower in one GGUF file, the way Ollama's converter lays them out.

Facts of the format: `convert/convert_gemma3.go`, `convert_gemma.go`, `convert_mistral.go`, `convert_qwen25vl.go`,
`convert_qwen3vl.go` and `convert_qwen3next.go` of Ollama v0.24.0. The values are float32 here, where Ollama writes
float16.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Arrays = dict[str, np.ndarray]
_ENCODER = "vision_tower.vision_model.encoder.layers.{}."
_BLOCK = "vision_tower.transformer.layers.{}."
GEMMA3 = {
    "vision_tower.vision_model.embeddings.patch_embedding": "v.patch_embedding",
    "vision_tower.vision_model.embeddings.position_embedding": "v.position_embedding",
    "vision_tower.vision_model.post_layernorm": "v.post_layernorm",
    f"{_ENCODER}layer_norm1": "v.blk.{}.layer_norm1",
    f"{_ENCODER}layer_norm2": "v.blk.{}.layer_norm2",
    f"{_ENCODER}self_attn.q_proj": "v.blk.{}.attn_q",
    f"{_ENCODER}self_attn.k_proj": "v.blk.{}.attn_k",
    f"{_ENCODER}self_attn.v_proj": "v.blk.{}.attn_v",
    f"{_ENCODER}self_attn.out_proj": "v.blk.{}.attn_output",
    f"{_ENCODER}mlp.fc1": "v.blk.{}.mlp.fc1",
    f"{_ENCODER}mlp.fc2": "v.blk.{}.mlp.fc2",
    "multi_modal_projector.mm_soft_emb_norm": "mm.mm_soft_emb_norm",
    "multi_modal_projector.mm_input_projection": "mm.mm_input_projection",
}
MISTRAL3 = {
    "vision_tower.patch_conv": "v.patch_conv",
    "vision_tower.ln_pre": "v.encoder_norm",
    f"{_BLOCK}attention_norm": "v.blk.{}.attn_norm",
    f"{_BLOCK}ffn_norm": "v.blk.{}.ffn_norm",
    f"{_BLOCK}attention.q_proj": "v.blk.{}.attn_q",
    f"{_BLOCK}attention.k_proj": "v.blk.{}.attn_k",
    f"{_BLOCK}attention.v_proj": "v.blk.{}.attn_v",
    f"{_BLOCK}attention.o_proj": "v.blk.{}.attn_output",
    f"{_BLOCK}feed_forward.gate_proj": "v.blk.{}.ffn_gate",
    f"{_BLOCK}feed_forward.up_proj": "v.blk.{}.ffn_up",
    f"{_BLOCK}feed_forward.down_proj": "v.blk.{}.ffn_down",
    "multi_modal_projector.norm": "mm.norm",
    "multi_modal_projector.patch_merger.merging_layer": "mm.patch_merger.merging_layer",
    "multi_modal_projector.linear_1": "mm.linear_1",
    "multi_modal_projector.linear_2": "mm.linear_2",
}
QWEN2_5_VL = {
    "visual.blocks.{}.norm1": "v.blk.{}.ln1",
    "visual.blocks.{}.norm2": "v.blk.{}.ln2",
    "visual.blocks.{}.attn.proj": "v.blk.{}.attn_out",
    "visual.blocks.{}.mlp.gate_proj": "v.blk.{}.ffn_gate",
    "visual.blocks.{}.mlp.up_proj": "v.blk.{}.ffn_up",
    "visual.blocks.{}.mlp.down_proj": "v.blk.{}.ffn_down",
    "visual.merger.ln_q": "v.merger.ln_q",
    "visual.merger.mlp.0": "v.merger.mlp.0",
    "visual.merger.mlp.2": "v.merger.mlp.2",
}

QWEN3_VL = {
    "visual.patch_embed.proj": "v.patch_embed",
    "visual.pos_embed": "v.pos_embed",
    "visual.blocks.{}.norm1": "v.blk.{}.norm1",
    "visual.blocks.{}.norm2": "v.blk.{}.norm2",
    "visual.blocks.{}.attn.proj": "v.blk.{}.attn_out",
    "visual.blocks.{}.mlp.linear_fc1": "v.blk.{}.mlp.linear_fc1",
    "visual.blocks.{}.mlp.linear_fc2": "v.blk.{}.mlp.linear_fc2",
    "visual.deepstack_merger_list.{}.norm": "v.deepstack_merger.{}.norm",
    "visual.deepstack_merger_list.{}.linear_fc1": "v.deepstack_merger.{}.linear_fc1",
    "visual.deepstack_merger_list.{}.linear_fc2": "v.deepstack_merger.{}.linear_fc2",
    "visual.merger.norm": "v.merger.norm",
    "visual.merger.linear_fc1": "v.merger.linear_fc1",
    "visual.merger.linear_fc2": "v.merger.linear_fc2",
}


def gemma3(weights: Arrays) -> Arrays:
    norm = "multi_modal_projector.mm_soft_emb_norm.weight"
    renamed = {name.replace("_projection_weight", "_projection.weight"): value for name, value in weights.items()}
    return renamed | {norm: weights[norm] + np.float32(1)}


def qwen2_5_vl(weights: Arrays) -> Arrays:
    made: Arrays = {}
    for name, value in weights.items():
        if name.endswith("patch_embed.proj.weight"):
            made["v.patch_embd_0.weight"], made["v.patch_embd_1.weight"] = value[:, :, 0], value[:, :, 1]
        else:
            made |= apart(name, value)
    return made


def qwen3_vl(weights: Arrays) -> Arrays:
    made: Arrays = {}
    for name, value in weights.items():
        if name.endswith("patch_embed.proj.weight"):
            made[name] = value.reshape(-1, *value.shape[2:])
        else:
            made |= apart(name, value)
    return made


def apart(name: str, value: np.ndarray) -> Arrays:
    """Queries, keys and values."""
    if (match := re.fullmatch(r"visual\.blocks\.(\d+)\.attn\.qkv\.(\w+)", name)) is None:
        return {name: value}
    parts = zip("qkv", np.split(value, 3), strict=True)
    return {f"v.blk.{match[1]}.attn_{part}.{match[2]}": rows for part, rows in parts}


def as_they_are(weights: Arrays) -> Arrays:
    return weights


@dataclass(frozen=True, slots=True)
class OneFile:
    """How Ollama's converter writes a family."""

    arch: str
    """`general.architecture`."""
    names: Mapping[str, str]
    metadata: Mapping[str, Any]
    """What it says of the tower, under names without the architecture's."""
    stored: Callable[[Arrays], Arrays] = as_they_are
    unsaid: tuple[str, ...] = ()
    """What it does not say of the text model, under names without the architecture's."""

    def name(self, name: str) -> str:
        """GGUF's name of a tensor of the tower."""
        if name.startswith("v."):
            return name
        module, _, kind = name.rpartition(".")
        number = next(iter(re.findall(r"\.(\d+)\.", module)), "")
        pattern = module if module in self.names else re.sub(r"\.\d+\.", ".{}.", module, count=1)
        return f"{self.names[pattern].format(number)}.{kind}"


def write(path: Path, layout: OneFile, text: Path, tower: Arrays) -> None:
    """The text model of a file, and a tower's tensors by their Hugging Face names."""
    reader = gguf.GGUFReader(text)
    own = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, layout.arch)
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key.removeprefix(f"{own}.") in layout.unsaid:
            continue
        kinds = entry.types
        named = key.replace(f"{own}.", f"{layout.arch}.", 1) if key.startswith(f"{own}.") else key
        named = named.replace("rope.dimension_sections", "rope.mrope_section")
        writer.add_key_value(named, entry.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)
    for key, value in layout.metadata.items():
        match value:
            case bool():
                writer.add_bool(f"{layout.arch}.{key}", value)
            case int():
                writer.add_uint32(f"{layout.arch}.{key}", value)
            case float():
                writer.add_float32(f"{layout.arch}.{key}", value)
            case str():
                writer.add_string(f"{layout.arch}.{key}", value)
            case _:
                writer.add_array(f"{layout.arch}.{key}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, value in layout.stored(tower).items():
        writer.add_tensor(layout.name(name), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _dims(layers: int, image: int, patch: int, **more: object) -> dict[str, object]:
    return {
        "vision.block_count": layers,
        "vision.embedding_length": 24,
        "vision.feed_forward_length": 40,
        "vision.image_size": image,
        "vision.patch_size": patch,
        "vision.num_channels": 3,
        "vision.attention.head_count": 3,
    } | more


_QWEN3 = {
    "vision.embedding_length": 24,
    "vision.attention.head_count": 3,
    "vision.num_channels": 3,
    "vision.patch_size": 4,
    "vision.spatial_merge_size": 2,
    "vision.temporal_patch_size": 2,
    "vision.shortest_edge": 1000,
    "vision.longest_edge": 1400,
    "vision.image_mean": [0.4, 0.5, 0.6],
    "vision.image_std": [0.3, 0.45, 0.5],
}
LAYOUTS = {
    "gemma3": OneFile(
        "gemma3",
        GEMMA3,
        _dims(2, 24, 4) | {"vision.attention.layer_norm_epsilon": 0.02, "mm.tokens_per_image": 9},
        gemma3,
    ),
    "mistral3_vl": OneFile(
        "mistral3",
        MISTRAL3,
        _dims(2, 52, 4)
        | {
            "vision.attention.key_length": 8,
            "vision.rope.freq_base": 30.0,
            "image_token_index": 300,
            "spatial_merge_size": 3,
            "mm.projector_bias": True,
            "mm.projector_hidden_act": "gelu",
            "rope.scaling.type": "",
            "rope.scaling.factor": 0.0,
        },
    ),
    "qwen2_5_vl": OneFile(
        "qwen25vl",
        QWEN2_5_VL,
        _dims(4, 560, 4)
        | {
            "vision.feed_forward_length": 20,
            "vision.spatial_merge_size": 2,
            "vision.spatial_patch_size": 4,
            "vision.window_size": 24,
            "vision.attention.layer_norm_epsilon": 1e-6,
            "vision.rope.freq_base": 1e4,
            "vision.fullatt_block_indexes": [1, 3],
            "vision.temporal_patch_size": 2,
        },
        qwen2_5_vl,
    ),
    "qwen3_vl": OneFile(
        "qwen3vl",
        QWEN3_VL,
        _QWEN3
        | {
            "vision.block_count": 3,
            "vision.attention.layer_norm_epsilon": 1e-6,
            "vision.rope.freq_base": 1e4,
            "vision.deepstack_visual_indexes": [0, 2],
        },
        qwen3_vl,
        ("n_deepstack_layers",),
    ),
    "qwen3_5_vl": OneFile("qwen35", QWEN3_VL, _QWEN3 | {"vision.block_count": 2}, qwen3_vl),
}
