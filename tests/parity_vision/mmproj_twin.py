"""A tower as a projector file, the way llama.cpp's converter lays it out.

Facts of the format: `conversion/base.py` (MmprojModel), `gemma.py`, `llava.py`, `qwenvl.py` and
`gguf-py/gguf/tensor_mapping.py` of llama.cpp; for LLaVA 1.5 `tools/mtmd/legacy-models`, whose names of an MLP's two
matrices are crossed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, halves_to_pairs

JSONFile = Mapping[str, Any]

SIGLIP = {
    "vision_tower.vision_model.embeddings.patch_embedding": "v.patch_embd",
    "vision_tower.vision_model.embeddings.position_embedding": "v.position_embd",
    "vision_tower.vision_model.post_layernorm": "v.post_ln",
    "vision_tower.vision_model.encoder.layers.{}.layer_norm1": "v.blk.{}.ln1",
    "vision_tower.vision_model.encoder.layers.{}.layer_norm2": "v.blk.{}.ln2",
    "vision_tower.vision_model.encoder.layers.{}.self_attn.q_proj": "v.blk.{}.attn_q",
    "vision_tower.vision_model.encoder.layers.{}.self_attn.k_proj": "v.blk.{}.attn_k",
    "vision_tower.vision_model.encoder.layers.{}.self_attn.v_proj": "v.blk.{}.attn_v",
    "vision_tower.vision_model.encoder.layers.{}.self_attn.out_proj": "v.blk.{}.attn_out",
}
GEMMA3 = SIGLIP | {
    "vision_tower.vision_model.encoder.layers.{}.mlp.fc1": "v.blk.{}.ffn_up",
    "vision_tower.vision_model.encoder.layers.{}.mlp.fc2": "v.blk.{}.ffn_down",
    "multi_modal_projector.mm_input_projection": "mm.input_projection",
    "multi_modal_projector.mm_soft_emb_norm": "mm.soft_emb_norm",
}
CLIP = SIGLIP | {
    "vision_tower.vision_model.embeddings.class_embedding": "v.class_embd",
    "vision_tower.vision_model.pre_layrnorm": "v.pre_ln",
    "vision_tower.vision_model.encoder.layers.{}.mlp.fc1": "v.blk.{}.ffn_down",
    "vision_tower.vision_model.encoder.layers.{}.mlp.fc2": "v.blk.{}.ffn_up",
    "multi_modal_projector.linear_1": "mm.0",
    "multi_modal_projector.linear_2": "mm.2",
}
PIXTRAL = {
    "vision_tower.patch_conv": "v.patch_embd",
    "vision_tower.ln_pre": "v.pre_ln",
    "vision_tower.transformer.layers.{}.attention_norm": "v.blk.{}.ln1",
    "vision_tower.transformer.layers.{}.ffn_norm": "v.blk.{}.ln2",
    "vision_tower.transformer.layers.{}.attention.q_proj": "v.blk.{}.attn_q",
    "vision_tower.transformer.layers.{}.attention.k_proj": "v.blk.{}.attn_k",
    "vision_tower.transformer.layers.{}.attention.v_proj": "v.blk.{}.attn_v",
    "vision_tower.transformer.layers.{}.attention.o_proj": "v.blk.{}.attn_out",
    "vision_tower.transformer.layers.{}.feed_forward.gate_proj": "v.blk.{}.ffn_gate",
    "vision_tower.transformer.layers.{}.feed_forward.up_proj": "v.blk.{}.ffn_up",
    "vision_tower.transformer.layers.{}.feed_forward.down_proj": "v.blk.{}.ffn_down",
    "multi_modal_projector.norm": "mm.input_norm",
    "multi_modal_projector.patch_merger.merging_layer": "mm.patch_merger",
    "multi_modal_projector.linear_1": "mm.1",
    "multi_modal_projector.linear_2": "mm.2",
}
QWEN2_5_VL = {
    "visual.blocks.{}.norm1": "v.blk.{}.ln1",
    "visual.blocks.{}.norm2": "v.blk.{}.ln2",
    "visual.blocks.{}.attn.q": "v.blk.{}.attn_q",
    "visual.blocks.{}.attn.k": "v.blk.{}.attn_k",
    "visual.blocks.{}.attn.v": "v.blk.{}.attn_v",
    "visual.blocks.{}.attn.proj": "v.blk.{}.attn_out",
    "visual.blocks.{}.mlp.gate_proj": "v.blk.{}.ffn_gate",
    "visual.blocks.{}.mlp.up_proj": "v.blk.{}.ffn_up",
    "visual.blocks.{}.mlp.down_proj": "v.blk.{}.ffn_down",
    "visual.merger.ln_q": "v.post_ln",
    "visual.merger.mlp.0": "mm.0",
    "visual.merger.mlp.2": "mm.2",
}

QWEN2_VL = {name: each for name, each in QWEN2_5_VL.items() if ".mlp.gate" not in name and "_proj" not in name} | {
    "visual.blocks.{}.mlp.fc1": "v.blk.{}.ffn_up",
    "visual.blocks.{}.mlp.fc2": "v.blk.{}.ffn_down",
}
QWEN3_VL = {
    "visual.patch_embed.proj": "v.patch_embd",
    "visual.pos_embed": "v.position_embd",
    "visual.blocks.{}.norm1": "v.blk.{}.ln1",
    "visual.blocks.{}.norm2": "v.blk.{}.ln2",
    "visual.blocks.{}.attn.qkv": "v.blk.{}.attn_qkv",
    "visual.blocks.{}.attn.proj": "v.blk.{}.attn_out",
    "visual.blocks.{}.mlp.linear_fc1": "v.blk.{}.ffn_up",
    "visual.blocks.{}.mlp.linear_fc2": "v.blk.{}.ffn_down",
    "visual.merger.norm": "v.post_ln",
    "visual.merger.linear_fc1": "mm.0",
    "visual.merger.linear_fc2": "mm.2",
}


def as_they_are(weights: Arrays, vision: JSONFile) -> Arrays:
    return weights


@dataclass(frozen=True, slots=True)
class Projector:
    """How llama.cpp's converters write a family's tower."""

    kind: str
    """`clip.projector_type`."""
    names: Mapping[str, str]
    """GGUF's names of modules by Hugging Face's."""
    metadata: Callable[[gguf.GGUFWriter, JSONFile], None]
    """Writes, from config.json, what not every family has."""
    stored: Callable[[Arrays, JSONFile], Arrays] = as_they_are
    """The weights as they are stored, under Hugging Face's names or GGUF's, from these and `vision_config`."""

    def name(self, name: str) -> str:
        """GGUF's name of a tensor."""
        if name.startswith(("v.", "mm.")):
            return name
        module, dot, kind = name.rpartition(".")
        if name in self.names:
            module, dot, kind = name, "", ""
        number = next(iter(re.findall(r"\.(\d+)\.", module)), "")
        pattern = module if module in self.names else re.sub(r"\.\d+\.", ".{}.", module, count=1)
        return self.names[pattern].format(number) + dot + kind


def _count(vision: JSONFile, *names: str) -> int:
    return int(next(vision[name] for name in names if name in vision))


def write(path: Path, projector: Projector, config: JSONFile, images: JSONFile, weights: Arrays, width: int) -> None:
    """Write the file: config.json's, the processor's, the tower's tensors, and how wide the text model is."""
    vision = config["vision_config"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string("clip.projector_type", projector.kind)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(width)
    writer.add_vision_image_size(vision.get("image_size", 560))
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(_count(vision, "num_hidden_layers", "depth"))
    writer.add_vision_head_count(_count(vision, "num_attention_heads", "num_heads"))
    writer.add_vision_image_mean(images["image_mean"])
    writer.add_vision_image_std(images["image_std"])
    projector.metadata(writer, config)
    for name, value in projector.stored(weights, vision).items():
        writer.add_tensor(projector.name(name), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gemma3(writer: gguf.GGUFWriter, config: JSONFile) -> None:
    vision = config["vision_config"]
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_use_gelu(True)
    side = vision["image_size"] // vision["patch_size"]
    writer.add_vision_projector_scale_factor(side // int(config["mm_tokens_per_image"] ** 0.5))


def in_pairs(weights: Arrays, vision: JSONFile) -> Arrays:
    """Pixtral's: queries and keys turn by neighbours there."""
    heads = vision["num_attention_heads"]
    turned = ("attention.q_proj.weight", "attention.k_proj.weight")
    return {name: halves_to_pairs(value, heads) if name.endswith(turned) else value for name, value in weights.items()}


def in_frames(weights: Arrays, vision: JSONFile) -> Arrays:
    """Qwen's: a convolution a frame, and queries, keys and values apart."""
    made: Arrays = {}
    for name, value in weights.items():
        if name.endswith("patch_embed.proj.weight"):
            made["v.patch_embd.weight"], made["v.patch_embd.weight.1"] = value[:, :, 0], value[:, :, 1]
        elif ".qkv." in name:
            made |= {name.replace("qkv", part): rows for part, rows in zip("qkv", np.split(value, 3), strict=True)}
        else:
            made[name] = value
    return made


def at_their_layers(weights: Arrays, vision: JSONFile) -> Arrays:
    """Qwen3-VL's: a convolution a frame, and what makes rows before the end by the number of its layer."""
    made: Arrays = {}
    for name, value in weights.items():
        if name.endswith("patch_embed.proj.weight"):
            made["v.patch_embd.weight"], made["v.patch_embd.weight.1"] = value[:, :, 0], value[:, :, 1]
        elif match := re.fullmatch(r"visual\.deepstack_merger_list\.(\d+)\.(?:linear_)?(\w+\.\w+)", name):
            made[f"v.deepstack.{vision['deepstack_visual_indexes'][int(match[1])]}.{match[2]}"] = value
        else:
            made[name] = value
    return made


def with_one_added(weights: Arrays, vision: JSONFile) -> Arrays:
    """Gemma's norm behind the tower; and its matrix is called a weight."""
    norm = "multi_modal_projector.mm_soft_emb_norm.weight"
    renamed = {name.replace("_projection_weight", "_projection.weight"): value for name, value in weights.items()}
    return renamed | {norm: weights[norm] + np.float32(1)}


def without_the_last(weights: Arrays, vision: JSONFile) -> Arrays:
    """LLaVA's: no layer behind those that count, and no norm."""
    last = f"vision_tower.vision_model.encoder.layers.{vision['num_hidden_layers']}."
    return {name: each for name, each in weights.items() if not name.startswith(last) and "post_layernorm" not in name}


def renamed(weights: Arrays, starts: Mapping[str, str]) -> Arrays:
    """Tensors whose names begin so, by names that begin otherwise."""
    made: Arrays = {}
    for name, value in weights.items():
        start = next((each for each in starts if name.startswith(each)), None)
        if start is not None:
            made[starts[start] + name.removeprefix(start)] = value
    return made


def halves(weights: Arrays) -> tuple[Arrays, Arrays]:
    """The text model's tensors and the tower's, by the names that these have in the files llama.cpp reads."""
    tower = {
        "model.vision_tower.": "vision_tower.",
        "vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "multi_modal_projector.": "multi_modal_projector.",
        "visual.": "visual.",
    }
    text = {
        "model.language_model.": "model.",
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.": "model.",
        "lm_head.": "lm_head.",
    }
    seen = renamed(weights, tower)
    left = {name: value for name, value in weights.items() if not name.startswith(tuple(tower))}
    return renamed(left, text), seen
