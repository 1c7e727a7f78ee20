"""DeepSeek-V3 and Kimi K2: latent attention, and experts chosen by sigmoid and a bias from the best groups.

Source: transformers' `modeling_deepseek_v3`; llama.cpp `convert_hf_to_gguf.py`, DeepseekV2Model.
"""

from collections.abc import Callable, Mapping

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.experts import STACKS, sigmoid_moe
from models.arch.latent import LatentLayer, latent_model, latent_weights, read_latent
from models.arch.latent_gguf import latent_layout
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata


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


def _by_sigmoid(metadata: GGUFMetadata) -> bool:
    return metadata.integer("expert_gating_func") == 2


ARCHITECTURE = Architecture(
    hf=("DeepseekV3ForCausalLM",),
    gguf=(latent_layout("deepseek2", hf="DeepseekV3ForCausalLM", model_type="deepseek_v3", applies=_by_sigmoid),),
    build=build,
)
