"""DeepSeek-V2: latent attention, and experts chosen by softmax, perhaps from the best groups.

Source: transformers' `modeling_deepseek_v2`; llama.cpp `convert_hf_to_gguf.py`, DeepseekV2Model.
"""

from collections.abc import Mapping

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.experts import STACKS, experts, shared_expert
from models.arch.latent import LatentLayer, latent_model, latent_weights, read_latent
from models.arch.latent_gguf import latent_layout
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Routing


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    dims, spec = read_latent(config)
    dense = reader.integer("first_k_dense_replace", 0)
    layers = []
    for index in range(dims.num_layers):
        name = f"model.layers.{index}"
        norm1, norm2 = blocks.layer_norm_pair(dims, name)
        mlp = blocks.mlp(dims, name) if index < dense else _moe(reader, dims, f"{name}.mlp")
        layers.append(LatentLayer(norm1, latent_weights(config, dims, spec, name), norm2, mlp))
    return latent_model(dims, layers, spec, STACKS, mtp_layers=0)


def _moe(reader: ConfigReader, dims: blocks.Dims, name: str) -> blocks.MoE:
    count, width, hidden = reader.size("n_routed_experts"), reader.size("moe_intermediate_size"), dims.hidden_size
    return blocks.MoE(
        Linear(f"{name}.gate", hidden, count),
        experts(name, count, hidden, width),
        _routing(reader, count),
        shared=shared_expert(f"{name}.shared_experts", hidden, reader.size("n_shared_experts") * width),
    )


def _routing(reader: ConfigReader, count: int) -> Routing:
    for key, value, wanted in (
        ("norm_topk_prob", reader.flag("norm_topk_prob", default=False), False),
        ("scoring_func", reader.text("scoring_func", "softmax"), "softmax"),
        ("moe_layer_freq", reader.integer("moe_layer_freq", 1), 1),
    ):
        if value != wanted:
            raise CheckpointError(f"{key} {value!r} is not supported", file=blocks.FILE)
    method = reader.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(f"topk_method {method!r} is not supported", file=blocks.FILE)
    limited = method == "group_limited_greedy"
    groups = reader.count("n_group", count) if limited else 1
    return Routing(
        reader.count("num_experts_per_tok", count),
        normalized=False,
        scale=reader.number("routed_scaling_factor", 1.0),
        groups=groups,
        kept_groups=reader.count("topk_group", groups) if limited else 1,
    )


def _by_softmax(metadata: GGUFMetadata) -> bool:
    return metadata.integer("expert_gating_func") in (None, 1)


ARCHITECTURE = Architecture(
    hf=("DeepseekV2ForCausalLM",),
    gguf=(latent_layout("deepseek2", hf="DeepseekV2ForCausalLM", model_type="deepseek_v2", applies=_by_softmax),),
    build=build,
)
