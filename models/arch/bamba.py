"""Bamba: Mamba-2 on most layers, attention that rotates half of each head on the others, dense MLPs.

Source: transformers' `modeling_bamba`.
"""

from collections.abc import Mapping

from models.arch import blocks, granite, granitemoehybrid, recurrent
from models.arch.base import Architecture, Model
from models.arch.blocks import Dims
from models.arch.granitemoehybrid import Layer
from models.config_reader import JSON, ConfigReader
from models.ops import Norm

_DEFAULTS: Mapping[str, JSON] = {
    "max_position_embeddings": 262144,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
_NO_FACTORS = granite.Factors(1.0, 1.0, 1.0)


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS) | {"partial_rotary_factor": 0.5}
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    (spec,) = blocks.attention_specs(config, dims, [None])
    attending = reader.integers("attn_layer_indices")
    layers = [_layer(config, dims, index, attends=index in attending) for index in range(dims.num_layers)]
    norm = Norm("model.final_layernorm", dims.hidden_size, dims.eps)
    return granitemoehybrid.model_with(dims, blocks.decoder_with(dims, layers, norm), spec, _NO_FACTORS)


def _layer(config: Mapping[str, JSON], dims: Dims, index: int, *, attends: bool) -> Layer:
    reader, name = ConfigReader(config), f"model.layers.{index}"
    norm1, norm2 = (Norm(f"{name}.{part}_layernorm", dims.hidden_size, dims.eps) for part in ("input", "pre_ff"))
    mlp = blocks.mlp(dims, name, module="feed_forward", bias=reader.flag("mlp_bias", default=False))
    if attends:
        bias = reader.flag("attention_bias", default=False)
        return Layer(norm1, blocks.attention(dims, name, qkv_bias=bias, out_bias=bias), norm2, mlp)
    inner = reader.size("mamba_expand", 2) * dims.hidden_size
    sizes = recurrent.read_sizes(config, inner, dims.eps, dims.activation)
    return Layer(norm1, recurrent.mixer(sizes, f"{name}.mamba"), norm2, mlp)


ARCHITECTURE = Architecture(
    hf=("BambaForCausalLM",),
    gguf=(),
    build=build,
    without_gguf="llama.cpp calls it granitehybrid, and what is read under that name computes the same",
)
