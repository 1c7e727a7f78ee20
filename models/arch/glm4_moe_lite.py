"""GLM-4.7-Flash: DeepSeek-V3's attention and experts in other sizes, the first layer dense.

Source: transformers' `modeling_glm4_moe_lite`; llama.cpp `convert_hf_to_gguf.py`, Glm4MoeLiteModel.
"""

from collections.abc import Mapping

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.deepseek_v3 import build_with
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    layers = reader.size("num_hidden_layers")
    dense = reader.integer("first_k_dense_replace", 1)
    kinds = reader.texts("mlp_layer_types") or ["dense" if index < dense else "sparse" for index in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
        raise CheckpointError(f"mlp_layer_types must name {layers} kinds, dense or sparse", file=blocks.FILE)
    mtp_layers = reader.integer("num_nextn_predict_layers", 1)
    return build_with(config, lambda index: kinds[index] == "sparse", mtp_layers=mtp_layers)


ARCHITECTURE = Architecture(
    hf=("Glm4MoeLiteForCausalLM",),
    gguf=(),
    build=build,
    without_gguf="llama.cpp writes it as a DeepSeek-V3, and so it is read",
)
