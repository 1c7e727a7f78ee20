"""EXAONE 4: norms behind the branches and on each head's query and key; layers that see everything have no positions.

Without a window, all layers have positions. Source: transformers' `modeling_exaone4`; llama.cpp `conversion/exaone.py`,
Exaone4Model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from models.arch import blocks, gguf, kinds, olmo2
from models.arch.base import Architecture, Model
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Norm

_FULL_EVERY = 4


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, {"rms_norm_eps": 1e-5, "sliding_window": 4096}, nullable=("sliding_window",))
    dims = blocks.read_dims(config)
    return olmo2.model(dims, [_layer(dims, index) for index in range(dims.num_layers)], _specs(config, dims))


def _specs(config: Mapping[str, JSON], dims: Dims) -> Sequence[Attention]:
    if config["sliding_window"] is None:
        return blocks.attention_specs(config, dims, [None] * dims.num_layers)
    # A pattern in letters is not read: what it makes of the last layer is said in two ways. Its models list the layers.
    listed = config.get("layer_types") is not None
    interval = _FULL_EVERY if listed else ConfigReader(config).size("sliding_window_pattern", _FULL_EVERY)
    windows = kinds.window_of_sliding(config, kinds.sliding_but_every(config, interval))
    specs = blocks.attention_specs(config, dims, windows)
    return [spec if spec.window is not None else replace(spec, rope=None) for spec in specs]


def _layer(dims: Dims, index: int) -> olmo2.Layer:
    layer = olmo2.layer(dims, index, bias=False)
    q_norm, k_norm = (Norm(f"model.layers.{index}.self_attn.{part}_norm", dims.head_dim, dims.eps) for part in "qk")
    return replace(layer, attention=replace(layer.attention, q_norm=q_norm, k_norm=k_norm))


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    if metadata.integer("nextn_predict_layers"):
        key = f"{metadata.arch}.nextn_predict_layers"
        raise CheckpointError(f"its metadata has {key}, which is not supported", file=metadata.file)
    return gguf.decoder_config(metadata) | {
        "sliding_window": metadata.integer("attention.sliding_window") or None,
        "layer_types": gguf.layer_types(metadata, _FULL_EVERY),
    }


ARCHITECTURE = Architecture(
    hf=("Exaone4ForCausalLM",),
    gguf=(
        gguf.layout(
            "exaone4",
            hf="Exaone4ForCausalLM",
            model_type="exaone4",
            config=_gguf_config,
            names=olmo2.NAMES,
        ),
    ),
    build=build,
)
