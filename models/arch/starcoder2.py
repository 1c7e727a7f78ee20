"""StarCoder2: LayerNorms, MLPs without a gate, biases everywhere, a window by option.

Source: transformers' `modeling_starcoder2`; llama.cpp `conversion/starcoder.py`, StarCoder2Model.
"""

from collections.abc import Mapping

from models.arch import blocks, gguf, layer_normed
from models.arch.base import Architecture, Model
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata

_DEFAULTS: Mapping[str, JSON] = {
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    reader, dims = ConfigReader(config), blocks.read_dims(config, eps="norm_epsilon")
    bias, window = reader.flag("use_bias", default=True), reader.integer("sliding_window", 0) or None
    specs = blocks.attention_specs(config, dims, [window] * dims.num_layers)
    layers = [_layer(dims, f"model.layers.{index}", bias=bias) for index in range(dims.num_layers)]
    return layer_normed.model(dims, layers, specs)


def _layer(dims: Dims, name: str, *, bias: bool) -> layer_normed.Layer:
    mlp = layer_normed.mlp(dims, f"{name}.mlp.c_fc", f"{name}.mlp.c_proj", bias=bias)
    return layer_normed.layer(dims, name, blocks.attention(dims, name, qkv_bias=bias, out_bias=bias), mlp)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    config = gguf.windowed_config(metadata)
    return config | {
        "norm_epsilon": metadata.real("attention.layer_norm_epsilon"),
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": config["attention_bias"],
    }


ARCHITECTURE = Architecture(
    hf=("Starcoder2ForCausalLM",),
    gguf=(
        gguf.layout(
            "starcoder2",
            hf="Starcoder2ForCausalLM",
            model_type="starcoder2",
            config=_gguf_config,
            ffn_gate="",
            ffn_up="mlp.c_fc",
            ffn_down="mlp.c_proj",
        ),
    ),
    build=build,
)
