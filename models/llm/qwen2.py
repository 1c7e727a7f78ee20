"""Qwen2 and Qwen2.5: biases on the query, key and value projections, a sliding window in the upper layers by option.

Source: transformers' `modeling_qwen2`.
"""

from collections.abc import Mapping

from models.checkpoint import JSON
from models.config_reader import ConfigReader
from models.llm.base import Architecture
from models.nn.decoder import Decoder, DecoderConfig, read_decoder_config, read_windows


def read_config(config: Mapping[str, JSON]) -> DecoderConfig:
    """Read a Qwen2's config.json. Raises CheckpointError."""
    reader = ConfigReader(config)
    windowed = reader.flag("use_sliding_window", default=False)
    first = reader.integer("max_window_layers", 28)
    return read_decoder_config(
        config, qkv_bias=True, windows=read_windows(config, first_windowed_layer=first) if windowed else ()
    )


ARCHITECTURE = Architecture(hf=("Qwen2ForCausalLM",), gguf=("qwen2",), config=read_config, model=Decoder)
