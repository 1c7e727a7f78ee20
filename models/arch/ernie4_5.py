"""ERNIE 4.5, the dense ones: Llamas whose rope pairs neighbours, with biases everywhere by option.

Source: transformers' `modeling_ernie4_5`; llama.cpp `conversion/ernie.py`, Ernie4_5Model.
"""

from collections.abc import Mapping

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.gguf_metadata import GGUFMetadata

_DEFAULTS: Mapping[str, JSON] = {
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    dims, bias = blocks.read_dims(config), ConfigReader(config).flag("use_bias", default=False)
    specs = blocks.attention_specs(config, dims, [None] * dims.num_layers, default_theta=500_000.0)
    layers = [blocks.layer(dims, index, bias=bias, mlp_bias=bias) for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), [blocks.interleaved(spec) for spec in specs])


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    config = gguf.decoder_config(metadata)
    return config | {"use_bias": config["attention_bias"]}


ARCHITECTURE = Architecture(
    hf=("Ernie4_5ForCausalLM",),
    gguf=(gguf.layout("ernie4_5", hf="Ernie4_5ForCausalLM", model_type="ernie4_5", config=_gguf_config),),
    build=build,
)
