"""ERNIE 4.5 MoE: neighbouring pairs rotated, experts chosen by softmax and a bias, on some layers.

Source: transformers' `modeling_ernie4_5_moe`; llama.cpp `convert_hf_to_gguf.py`, Ernie4_5MoeModel.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.experts import GGUF_NAMES, STACKS, experts, shared_expert
from models.arch.gguf import Config, decoder_config, layout
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Routing, Vector

_LARGEST_NORM_MIN = 1e-9
"""The sum of the picked weights is not divided by less; it never is so small."""


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    dims = replace(blocks.read_dims(config), tied=reader.flag("tie_word_embeddings", default=True))
    if reader.flag("use_bias", default=False):
        raise CheckpointError("use_bias is not supported", file=blocks.FILE)
    if reader.number("moe_norm_min", 1e-12) > _LARGEST_NORM_MIN:
        raise CheckpointError(f"moe_norm_min above {_LARGEST_NORM_MIN} is not supported", file=blocks.FILE)
    specs = [
        replace(spec, rope=None if spec.rope is None else replace(spec.rope, interleaved=True))
        for spec in blocks.attention_specs(config, dims, (None,) * dims.num_layers, default_theta=500_000.0)
    ]
    layers = [_layer(config, dims, index) for index in range(dims.num_layers)]
    model = blocks.model(dims, blocks.decoder(dims, layers), specs, STACKS)
    # Modules that predict further tokens are left out.
    return replace(model, other_parts=("mtp_",))


def _layer(config: Mapping[str, JSON], dims: blocks.Dims, index: int) -> blocks.Layer:
    reader, name = ConfigReader(config), f"model.layers.{index}"
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    end = reader.integer("moe_layer_end_index", -1)
    last = dims.num_layers - 1 if end == -1 else end
    within = reader.integer("moe_layer_start_index", 1) <= index <= last
    is_sparse = within and (index + 1) % reader.size("moe_layer_interval", 1) == 0
    mlp = _moe(config, dims, f"{name}.mlp") if is_sparse else blocks.mlp(dims, name)
    return blocks.Layer(norm1, blocks.attention(dims, name), norm2, mlp)


def _moe(config: Mapping[str, JSON], dims: blocks.Dims, name: str) -> blocks.MoE:
    reader, hidden = ConfigReader(config), dims.hidden_size
    count, width = reader.size("moe_num_experts", 64), reader.size("moe_intermediate_size", 1536)
    shared = reader.integer("moe_num_shared_experts", 2)
    bias = Vector(f"{name}.moe_statics.e_score_correction_bias", count, as_row="gguf_architecture" not in config)
    return blocks.MoE(
        Linear(f"{name}.gate", hidden, count),
        experts(name, count, hidden, width),
        Routing(reader.count("moe_k", count, 6), bias=bias),
        shared=shared_expert(f"{name}.shared_experts", hidden, shared * width) if shared else None,
    )


def _config(metadata: GGUFMetadata) -> Config:
    width = metadata.count("expert_feed_forward_length")
    shared = metadata.integer("expert_shared_feed_forward_length")
    return decoder_config(metadata) | {
        "moe_num_experts": metadata.count("expert_count"),
        "moe_k": metadata.count("expert_used_count"),
        "moe_intermediate_size": width,
        "moe_num_shared_experts": shared // width if shared else metadata.integer("expert_shared_count") or 0,
        "moe_layer_start_index": metadata.integer("leading_dense_block_count") or 0,
        "moe_layer_interval": metadata.integer("interleave_moe_layer_step") or 1,
    }


ARCHITECTURE = Architecture(
    hf=("Ernie4_5_MoeForCausalLM",),
    gguf=(
        layout(
            "ernie4_5-moe",
            hf="Ernie4_5_MoeForCausalLM",
            model_type="ernie4_5_moe",
            bare=("exp_probs_b",),
            config=_config,
            names=GGUF_NAMES,
            exp_probs_b="mlp.moe_statics.e_score_correction_bias",
            ffn_gate_shexp="mlp.shared_experts.gate_proj",
            ffn_up_shexp="mlp.shared_experts.up_proj",
            ffn_down_shexp="mlp.shared_experts.down_proj",
        ),
    ),
    build=build,
)
