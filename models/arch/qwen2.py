"""Qwen2 and Qwen2.5: biases on the query, key and value projections, a sliding window in the upper layers by option.

Source: transformers' `modeling_qwen2`; llama.cpp `convert_hf_to_gguf.py`, Qwen2Model.
"""

from collections.abc import Mapping

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.gguf import layout
from models.config_reader import JSON, ConfigReader


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims = blocks.read_dims(config)
    specs = blocks.attention_specs(config, dims, windows(config, dims))
    return blocks.model(dims, blocks.decoder(dims, [_layer(dims, n) for n in range(dims.num_layers)]), specs)


def windows(config: Mapping[str, JSON], dims: blocks.Dims) -> tuple[int | None, ...]:
    """The sliding window of each layer of a Qwen2 or Qwen3. Raises CheckpointError."""
    reader = ConfigReader(config)
    if not reader.flag("use_sliding_window", default=False):
        return (None,) * dims.num_layers
    return blocks.read_windows(config, first_windowed_layer=reader.integer("max_window_layers", 28))


def _layer(dims: blocks.Dims, index: int) -> blocks.Layer:
    name = f"model.layers.{index}"
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    return blocks.Layer(norm1, blocks.attention(dims, name, qkv_bias=True), norm2, blocks.mlp(dims, name))


ARCHITECTURE = Architecture(
    hf=("Qwen2ForCausalLM",),
    gguf=(layout("qwen2", hf="Qwen2ForCausalLM", model_type="qwen2"),),
    build=build,
)
