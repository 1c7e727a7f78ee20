"""Qwen3-MoE: a Qwen3 whose MLPs are mixtures of experts, all but those that the config names.

Source: transformers' `modeling_qwen3_moe`; llama.cpp `convert_hf_to_gguf.py`, Qwen3MoeModel.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks, qwen3
from models.arch.base import Architecture, Model
from models.arch.experts import GGUF_NAMES, STACKS, experts, is_sparse
from models.arch.gguf import Config, decoder_config, layout
from models.arch.qwen2 import windows
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Routing


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims = blocks.read_dims(config)
    specs = blocks.attention_specs(config, dims, windows(config, dims))
    return blocks.model(dims, blocks.decoder(dims, layers(config, dims)), specs, STACKS)


def layers(config: Mapping[str, JSON], dims: blocks.Dims) -> list[blocks.Layer]:
    """Declare all layers. Raises CheckpointError."""
    return [
        replace(layer, mlp=_moe(config, dims, f"model.layers.{index}.mlp")) if is_sparse(config, index) else layer
        for index, layer in enumerate(qwen3.layers(config, dims))
    ]


def _moe(config: Mapping[str, JSON], dims: blocks.Dims, name: str) -> blocks.MoE:
    reader = ConfigReader(config)
    count = reader.size("num_experts")
    normalized = reader.flag("norm_topk_prob", default=False)
    own = experts(name, count, dims.hidden_size, reader.size("moe_intermediate_size"))
    routing = Routing(reader.count("num_experts_per_tok", count), normalized=normalized)
    return blocks.MoE(Linear(f"{name}.gate", dims.hidden_size, count), own, routing)


def gguf_config(metadata: GGUFMetadata) -> Config:
    """The rest of config.json. Raises CheckpointError."""
    return decoder_config(metadata) | {
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": _width(metadata),
        "norm_topk_prob": True,
    }


def _width(metadata: GGUFMetadata) -> int:
    """Of an expert; Ollama's converter leaves it to the tensors to say."""
    down = metadata.shapes.get("blk.0.ffn_down_exps.weight", ())
    has_key = metadata.integer("expert_feed_forward_length") is not None
    return down[-1] if down and not has_key else metadata.count("expert_feed_forward_length")


ARCHITECTURE = Architecture(
    hf=("Qwen3MoeForCausalLM",),
    gguf=(
        layout(
            "qwen3moe",
            hf="Qwen3MoeForCausalLM",
            model_type="qwen3_moe",
            config=gguf_config,
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
            names=GGUF_NAMES,
        ),
    ),
    build=build,
)
