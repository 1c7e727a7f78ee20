"""Nemotron and Minitron, the dense ones: LayerNorms stored less 1, MLPs without a gate, a rope for a part of each head.

Source: transformers' `modeling_nemotron`; llama.cpp `conversion/nemotron.py`, NemotronModel.
"""

from collections.abc import Mapping

from models.arch import blocks, gguf, layer_normed
from models.arch.base import Architecture, Model
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata

_DEFAULTS: Mapping[str, JSON] = {
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
_STORED_LESS = 1.0


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    reader, dims = ConfigReader(config), blocks.read_dims(config, eps="norm_eps")
    bias, mlp_bias = (reader.flag(f"{part}_bias", default=False) for part in ("attention", "mlp"))
    specs = blocks.attention_specs(config, dims, [None] * dims.num_layers)
    names = [f"model.layers.{index}" for index in range(dims.num_layers)]
    layers = [_layer(dims, name, bias=bias, mlp_bias=mlp_bias) for name in names]
    return layer_normed.model(dims, layers, specs, norm_offset=_STORED_LESS)


def _layer(dims: Dims, name: str, *, bias: bool, mlp_bias: bool) -> layer_normed.Layer:
    attention = blocks.attention(dims, name, qkv_bias=bias, out_bias=bias)
    mlp = layer_normed.mlp(dims, f"{name}.mlp.up_proj", f"{name}.mlp.down_proj", bias=mlp_bias)
    return layer_normed.layer(dims, name, attention, mlp, norm_offset=_STORED_LESS)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    said: gguf.Config = {"norm_eps": metadata.real("attention.layer_norm_epsilon"), "hidden_act": "relu2"}
    return {"partial_rotary_factor": 1.0} | gguf.decoder_config(metadata) | said


ARCHITECTURE = Architecture(
    hf=("NemotronForCausalLM",),
    gguf=(
        gguf.layout(
            "nemotron",
            hf="NemotronForCausalLM",
            model_type="nemotron",
            config=_gguf_config,
            norm_shift=_STORED_LESS,
            ffn_gate="",
        ),
    ),
    build=build,
)
