"""LFM2-MoE: LFM2 whose later layers have experts, chosen by sigmoid and perhaps a bias.

Source: transformers' `modeling_lfm2_moe`; llama.cpp `conversion/lfm2.py`, LFM2MoeModel.
"""

from collections.abc import Mapping

from models.arch import blocks, gguf, lfm2
from models.arch.base import Architecture, Model
from models.arch.blocks import Dims, MoE
from models.arch.experts import experts, stacks_of
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Routing, Vector

_FLOOR = 1e-6
_NAMES = ("w1", "w3", "w2")


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, lfm2.DEFAULTS)
    dense = ConfigReader(config).integer("num_dense_layers", 2)
    return lfm2.build_with(
        config,
        lambda dims, layer: lfm2.mlp(dims, layer) if layer < dense else _moe(config, dims, layer),
        (*stacks_of(*_NAMES), *lfm2.RENAMED),
    )


def _moe(config: Mapping[str, JSON], dims: Dims, index: int) -> MoE:
    reader, name = ConfigReader(config), f"model.layers.{index}.feed_forward"
    count, width = reader.size("num_experts", 32), reader.size("moe_intermediate_size", 1792)
    has_bias = reader.flag("use_expert_bias", default=True)
    routing = Routing(
        reader.count("num_experts_per_tok", count, 4),
        score="sigmoid",
        normalized=reader.flag("norm_topk_prob", default=True),
        floor=_FLOOR,
        scale=reader.number("routed_scaling_factor", 1.0),
        bias=Vector(f"{name}.expert_bias", count) if has_bias else None,
    )
    own = experts(name, count, dims.hidden_size, width, names=_NAMES)
    return MoE(Linear(f"{name}.gate", dims.hidden_size, count), own, routing)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    return lfm2.gguf_config(metadata) | {
        "num_dense_layers": metadata.integer("leading_dense_block_count") or 0,
        "num_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "norm_topk_prob": metadata.flag("expert_weights_norm") is not False,
        "routed_scaling_factor": metadata.real("expert_weights_scale") or 1.0,
        "use_expert_bias": any("exp_probs_b" in name for name in metadata.shapes),
    }


ARCHITECTURE = Architecture(
    hf=("Lfm2MoeForCausalLM",),
    gguf=(
        gguf.layout(
            "lfm2moe",
            hf="Lfm2MoeForCausalLM",
            model_type="lfm2_moe",
            bare=("exp_probs_b",),
            config=_gguf_config,
            names=lfm2.GGUF_NAMES,
            top=lfm2.GGUF_TOP,
            ffn_gate_inp="feed_forward.gate",
            ffn_gate_exps="feed_forward.experts.*.w1",
            ffn_up_exps="feed_forward.experts.*.w3",
            ffn_down_exps="feed_forward.experts.*.w2",
            exp_probs_b="feed_forward.expert_bias",
        ),
    ),
    build=build,
)
