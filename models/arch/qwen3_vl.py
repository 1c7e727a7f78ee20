"""Qwen3-VL: a Qwen3 whose positions have axes in turns, and to whose first layers pictures say more.

Source: transformers' `modeling_qwen3_vl`; DeepStack (arXiv 2406.04334); llama.cpp `conversion/qwenvl.py`.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from models.arch import blocks, qwen3
from models.arch.base import Architecture, Model, Stack
from models.arch.gguf import Config, decoder_config, layout, with_axes
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import rope

DEFAULTS: Mapping[str, JSON] = {"max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_theta": 500_000.0}
GGUF_PARTS = ("v.", "mm.")
OTHER_PARTS = ("visual.", "vision_tower.")
_SECTIONS = (24, 20, 20)

LayersOf: TypeAlias = Callable[[Mapping[str, JSON], blocks.Dims], list[blocks.Layer]]


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    return build_with({"head_dim": 128} | dict(config), qwen3.layers)


def build_with(config: Mapping[str, JSON], layers_of: LayersOf, stacks: tuple[Stack, ...] = ()) -> Model:
    """The model with these layers.

    Raises:
        CheckpointError: a value is missing, impossible or unsupported.
    """
    config = rope.with_axes(blocks.completed(config, DEFAULTS), _SECTIONS, interleaved=True)
    dims = blocks.read_dims(config)
    specs = blocks.attention_specs(config, dims, (None,) * dims.num_layers)
    weights = blocks.decoder(dims, layers_of(config, dims))
    return blocks.model(dims, weights, specs, stacks, _levels(config, dims))


def _levels(config: Mapping[str, JSON], dims: blocks.Dims) -> int:
    """Behind how many layers pictures say more: so many as the tower has exits."""
    tower = ConfigReader(config).section("vision_config")
    exits = len((tower or ConfigReader({})).integers("deepstack_visual_indexes"))
    levels = ConfigReader(config).integer("deepstack_levels", exits)
    if tower is not None and levels != exits:
        raise CheckpointError(
            f"the decoder takes {levels} deepstack levels, and its tower has {exits}", file=blocks.FILE
        )
    if not 0 <= levels <= dims.num_layers:
        raise CheckpointError(f"{dims.num_layers} layers cannot take {levels} deepstack levels", file=blocks.FILE)
    return levels


def gguf_config(metadata: GGUFMetadata, config: Config) -> Config:
    """What such a model's file says besides. Raises CheckpointError."""
    config = with_axes(config, metadata)
    levels = metadata.integer("n_deepstack_layers")
    # Ollama's older files with the tower inside say it of the tower alone.
    exits = metadata.integers("vision.deepstack_visual_indexes") or []
    return config | {"deepstack_levels": len(exits) if levels is None else levels}


ARCHITECTURE = Architecture(
    hf=("Qwen3VLForConditionalGeneration",),
    gguf=(
        layout(
            "qwen3vl",
            hf="Qwen3VLForConditionalGeneration",
            model_type="qwen3_vl",
            config=lambda metadata: gguf_config(metadata, decoder_config(metadata)),
            other_parts=GGUF_PARTS,
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
        ),
    ),
    build=build,
    other_parts=OTHER_PARTS,
)
