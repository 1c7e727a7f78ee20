"""DeepSeek-V3 and Kimi K2: latent attention, and experts chosen by sigmoid and a bias from the best groups.

Source: transformers' `modeling_deepseek_v3`; llama.cpp `convert_hf_to_gguf.py`, DeepseekV2Model.
"""

from collections.abc import Callable, Mapping

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.experts import STACKS, experts, shared_expert
from models.arch.latent import LatentLayer, latent_model, latent_weights, read_latent
from models.arch.latent_gguf import latent_layout
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Linear, Routing, Vector

_FLOOR = 1e-20


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dense = ConfigReader(config).integer("first_k_dense_replace", 3)
    return build_with(config, lambda index: index >= dense, mtp_layers=_mtp_layers(config))


def _mtp_layers(config: Mapping[str, JSON]) -> int:
    reader = ConfigReader(config)
    return reader.integer("num_nextn_predict_layers", reader.integer("num_mtp_layers", 1))


def build_with(config: Mapping[str, JSON], is_sparse: Callable[[int], bool], *, mtp_layers: int) -> Model:
    """The model whose layers are mixtures where `is_sparse` says so. Raises CheckpointError."""
    dims, spec = read_latent(config)
    layers = []
    for index in range(dims.num_layers):
        name = f"model.layers.{index}"
        norm1, norm2 = blocks.layer_norm_pair(dims, name)
        mlp = sigmoid_moe(config, dims, f"{name}.mlp") if is_sparse(index) else blocks.mlp(dims, name)
        layers.append(LatentLayer(norm1, latent_weights(config, dims, spec, name), norm2, mlp))
    return latent_model(dims, layers, spec, STACKS, mtp_layers=mtp_layers)


def sigmoid_moe(config: Mapping[str, JSON], dims: blocks.Dims, name: str) -> blocks.MoE:
    """Declare a mixture whose experts are chosen by sigmoid scores, a bias and groups. Raises CheckpointError."""
    reader, hidden = ConfigReader(config), dims.hidden_size
    count, width = reader.size("n_routed_experts"), reader.size("moe_intermediate_size")
    shared = reader.integer("n_shared_experts", 1)
    return blocks.MoE(
        Linear(f"{name}.gate", hidden, count),
        experts(name, count, hidden, width),
        _routing(reader, count, Vector(f"{name}.gate.e_score_correction_bias", count)),
        shared=shared_expert(f"{name}.shared_experts", hidden, shared * width) if shared else None,
    )


def _routing(reader: ConfigReader, count: int, bias: Vector) -> Routing:
    for key, value, wanted in (
        ("scoring_func", reader.text("scoring_func", "sigmoid"), "sigmoid"),
        ("topk_method", reader.text("topk_method", "noaux_tc"), "noaux_tc"),
        ("moe_layer_freq", reader.integer("moe_layer_freq", 1), 1),
    ):
        if value != wanted:
            raise CheckpointError(f"{key} {value!r} is not supported", file=blocks.FILE)
    groups = reader.count("n_group", count, 1)
    if count % groups or count // groups < min(2, count):
        raise CheckpointError(f"{count} experts do not divide into {groups} groups of two or more", file=blocks.FILE)
    return Routing(
        reader.count("num_experts_per_tok", count),
        score="sigmoid",
        normalized=reader.flag("norm_topk_prob", default=True),
        floor=_FLOOR,
        scale=reader.number("routed_scaling_factor", 1.0),
        bias=bias,
        groups=groups,
        kept_groups=reader.count("topk_group", groups, 1),
        best_of_group=2,
    )


def _by_sigmoid(metadata: GGUFMetadata) -> bool:
    return metadata.integer("expert_gating_func") == 2


ARCHITECTURE = Architecture(
    hf=("DeepseekV3ForCausalLM",),
    gguf=(latent_layout("deepseek2", hf="DeepseekV3ForCausalLM", model_type="deepseek_v3", applies=_by_sigmoid),),
    build=build,
)
