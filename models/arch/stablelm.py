"""StableLM: a Llama with LayerNorms, whose rope turns a quarter of each head.

The 12B, with its norms on queries and keys and its branches side by side, is not read.

Source: transformers' `modeling_stablelm`; llama.cpp `convert_hf_to_gguf.py`, StableLMModel.
"""

from collections.abc import Mapping

from models.arch import blocks, gguf, layer_normed
from models.arch.base import Architecture, Model
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata

_DEFAULTS: Mapping[str, JSON] = {
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.25,
}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    reader, dims = ConfigReader(config), blocks.read_dims(config, eps="layer_norm_eps")
    for option in ("qk_layernorm", "use_parallel_residual"):
        if reader.flag(option, default=False):
            raise CheckpointError(f"{option} is not supported", file=blocks.FILE)
    bias = reader.flag("use_qkv_bias", default=False)
    specs = blocks.attention_specs(config, dims, [None] * dims.num_layers)
    layers = [_layer(dims, f"model.layers.{index}", bias=bias) for index in range(dims.num_layers)]
    return layer_normed.model(dims, layers, specs)


def _layer(dims: Dims, name: str, *, bias: bool) -> layer_normed.Layer:
    return layer_normed.layer(dims, name, blocks.attention(dims, name, qkv_bias=bias), blocks.mlp(dims, name))


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    config = {"partial_rotary_factor": 1.0} | gguf.decoder_config(metadata)
    return config | {
        "layer_norm_eps": metadata.real("attention.layer_norm_epsilon"),
        "use_qkv_bias": config["attention_bias"],
        "qk_layernorm": "blk.0.attn_q_norm.weight" in metadata.shapes,
        # As in llama.cpp; what the metadata say of it, a converter may have made up.
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in metadata.shapes,
    }


ARCHITECTURE = Architecture(
    hf=("StableLmForCausalLM",),
    gguf=(gguf.layout("stablelm", hf="StableLmForCausalLM", model_type="stablelm", config=_gguf_config),),
    build=build,
)
