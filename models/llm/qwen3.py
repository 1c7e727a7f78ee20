"""Qwen3: a norm on each head's query and key, no biases unless the config asks for them.

Source: transformers' `modeling_qwen3`.
"""

from collections.abc import Mapping

from models.checkpoint import JSON
from models.config_reader import ConfigReader
from models.llm.base import Architecture
from models.nn.decoder import Decoder, DecoderConfig, read_decoder_config, read_windows


def read_config(config: Mapping[str, JSON]) -> DecoderConfig:
    """Read a Qwen3's config.json. Raises CheckpointError."""
    reader = ConfigReader(config)
    bias = reader.flag("attention_bias", default=False)
    windowed = reader.flag("use_sliding_window", default=False)
    first = reader.integer("max_window_layers", 28)
    return read_decoder_config(
        config,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=read_windows(config, first_windowed_layer=first) if windowed else (),
    )


ARCHITECTURE = Architecture(hf=("Qwen3ForCausalLM",), gguf=("qwen3",), config=read_config, model=Decoder)
