"""Mixtral: a Mistral whose MLPs are mixtures of experts.

Source: transformers' `modeling_mixtral`; llama.cpp `convert_hf_to_gguf.py`, LlamaModel (a Llama with experts to it).
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.experts import STACKS, experts
from models.arch.gguf import Config, layout, windowed_config
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Routing


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims = blocks.read_dims(config)
    specs = blocks.attention_specs(config, dims, blocks.read_windows(config), default_theta=1_000_000.0)
    layers = [
        replace(blocks.layer(dims, index), mlp=_moe(config, dims, f"model.layers.{index}.block_sparse_moe"))
        for index in range(dims.num_layers)
    ]
    return blocks.model(dims, blocks.decoder(dims, layers), specs, STACKS)


def _moe(config: Mapping[str, JSON], dims: blocks.Dims, name: str) -> blocks.MoE:
    reader = ConfigReader(config)
    count = reader.size("num_local_experts", 8)
    own = experts(name, count, dims.hidden_size, dims.intermediate_size, names=("w1", "w3", "w2"))
    routing = Routing(reader.count("num_experts_per_tok", count, 2))
    return blocks.MoE(Linear(f"{name}.gate", dims.hidden_size, count), own, routing)


def _has_experts(metadata: GGUFMetadata) -> bool:
    return bool(metadata.integer("expert_count"))


def _config(metadata: GGUFMetadata) -> Config:
    return windowed_config(metadata) | {
        "num_local_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
    }


ARCHITECTURE = Architecture(
    hf=("MixtralForCausalLM",),
    gguf=(
        layout(
            "llama",
            hf="MixtralForCausalLM",
            model_type="mixtral",
            interleaved=("attn_q", "attn_k"),
            config=_config,
            applies=_has_experts,
            ffn_gate_inp="block_sparse_moe.gate",
            ffn_gate_exps="block_sparse_moe.experts.*.w1",
            ffn_up_exps="block_sparse_moe.experts.*.w3",
            ffn_down_exps="block_sparse_moe.experts.*.w2",
        ),
    ),
    build=build,
)
