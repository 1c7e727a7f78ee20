"""Llama, and the models that are Llamas in all but name: Mistral (with a sliding window) and SmolLM2.

Source: transformers' `modeling_llama` and `modeling_mistral`.
"""

from collections.abc import Mapping

from models.checkpoint import JSON
from models.config_reader import ConfigReader
from models.llm.base import Architecture
from models.nn.decoder import Decoder, DecoderConfig, read_decoder_config, read_windows


def read_config(config: Mapping[str, JSON]) -> DecoderConfig:
    """Read a Llama's or Mistral's config.json. Raises CheckpointError."""
    reader = ConfigReader(config)
    bias = reader.flag("attention_bias", default=False)
    is_mistral = "MistralForCausalLM" in (reader.texts("architectures") or [])
    return read_decoder_config(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=reader.flag("mlp_bias", default=False),
        windows=read_windows(config) if is_mistral else (),
    )


ARCHITECTURE = Architecture(
    hf=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf=("llama", "mistral"),
    config=read_config,
    model=Decoder,
)
