"""SmolLM3: a Llama whose every fourth layer has no positions, with a sliding window by option.

Source: transformers' `modeling_smollm3`; llama.cpp `convert_hf_to_gguf.py`, SmolLM3Model (a Llama to it).
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks
from models.arch.base import Architecture, Model
from models.arch.gguf import layout
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    dims = replace(blocks.read_dims(config), tied=reader.flag("tie_word_embeddings", default=True))
    rotated = _rotated(reader, dims.num_layers)
    attentions = blocks.attention_specs(config, dims, _windows(config, rotated), default_theta=2_000_000.0)
    specs = [spec if has_rope else replace(spec, rope=None) for spec, has_rope in zip(attentions, rotated, strict=True)]
    bias, mlp_bias = (reader.flag(f"{part}_bias", default=False) for part in ("attention", "mlp"))
    layers = [blocks.layer(dims, index, bias=bias, mlp_bias=mlp_bias) for index in range(dims.num_layers)]
    return blocks.model(dims, blocks.decoder(dims, layers), specs)


def _rotated(reader: ConfigReader, layers: int) -> list[bool]:
    """Which layers have positions: `no_rope_layers` has a 1 for each that has them."""
    if reader.flags("no_rope_layers") is None:
        interval = reader.size("no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(layers)]
    rotated = reader.flags("no_rope_layers") or []
    if len(rotated) < layers:
        raise CheckpointError(f"no_rope_layers must have a number for each of {layers} layers", file=blocks.FILE)
    return rotated[:layers]


def _windows(config: Mapping[str, JSON], rotated: list[bool]) -> tuple[int | None, ...]:
    """The window of each layer: without `layer_types`, of those that have no positions."""
    reader = ConfigReader(config)
    if not reader.flag("use_sliding_window", default=False):
        return (None,) * len(rotated)
    windows = blocks.read_windows(config)
    if reader.texts("layer_types") is not None:
        return windows
    return tuple(None if has_rope else window for window, has_rope in zip(windows, rotated, strict=True))


ARCHITECTURE = Architecture(
    hf=("SmolLM3ForCausalLM",),
    gguf=(layout("smollm3", hf="SmolLM3ForCausalLM", model_type="smollm3", interleaved=("attn_q", "attn_k")),),
    build=build,
)
