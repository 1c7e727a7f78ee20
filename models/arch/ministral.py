"""Ministral, Ministral 3 and the text part of Mistral 3: Mistrals, whose queries may grow with their position.

Source: transformers' `modeling_ministral`, `modeling_ministral3` and `modeling_mistral3`; llama.cpp
`conversion/mistral3.py`; ollama v0.17.0 convert/convert_mistral.go for its own keys and the vision tensors in the file.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks, gguf
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import PositionScale

_GROWING = "ministral3"
_ROPE: Mapping[str, JSON] = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    grows = "Ministral3ForCausalLM" in (reader.texts("architectures") or [])
    kind = reader.text("model_type", _GROWING if grows else "mistral")
    if kind not in (_GROWING, "ministral", "mistral"):
        raise CheckpointError(f"a text model of type {kind!r} is not supported", file=blocks.FILE)
    config = _with_defaults(config, kind)
    dims, scale = blocks.read_dims(config), _query_scale(config)
    specs = blocks.attention_specs(config, dims, blocks.read_windows(config))
    layers = [blocks.layer(dims, index) for index in range(dims.num_layers)]
    layers = [replace(each, attention=replace(each.attention, query_scale=scale)) for each in layers]
    return blocks.model(dims, blocks.decoder(dims, layers), specs)


def _with_defaults(config: Mapping[str, JSON], kind: str) -> Mapping[str, JSON]:
    if kind != _GROWING:
        return blocks.completed(config, {"sliding_window": 4096}, nullable=("sliding_window",))
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        config = {**config, "rope_parameters": dict(_ROPE)}
    return blocks.completed(config, {"rms_norm_eps": 1e-5})


def _query_scale(config: Mapping[str, JSON]) -> PositionScale | None:
    """How queries grow: by the rope's settings. Raises CheckpointError."""
    reader = ConfigReader(config)
    settings = reader.section("rope_parameters") or reader.section("rope_scaling") or ConfigReader({})
    beta = settings.number("llama_4_scaling_beta", 0.0)
    return PositionScale(beta, settings.size("original_max_position_embeddings")) if beta else None


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    config = gguf.windowed_config(metadata)
    scaling = config.pop("rope_scaling")
    rope = dict(scaling) if isinstance(scaling, dict) else {"rope_type": "default"}
    settings = {
        "beta_fast": metadata.real("rope.scaling.beta_fast"),
        "beta_slow": metadata.real("rope.scaling.beta_slow"),
        "mscale": metadata.real("rope.scaling.mscale") or 1.0,
        "mscale_all_dim": _first(metadata, "rope.scaling.yarn_log_multiplier", "rope.scaling.mscale_all_dim"),
        "llama_4_scaling_beta": _first(metadata, "attention.temperature_scale", "rope.scaling_beta"),
    }
    said: dict[str, JSON] = {key: value for key, value in settings.items() if value}
    period = metadata.integer("attention.temperature_length")
    if period and period != rope.get("original_max_position_embeddings"):
        raise CheckpointError(f"attention.temperature_length {period} is not supported", file=metadata.file)
    return config | {"rope_parameters": said | rope | {"rope_theta": config["rope_theta"]}}


def _first(metadata: GGUFMetadata, *names: str) -> float | None:
    """What llama.cpp's converter says, else what Ollama's does."""
    return next((value for name in names if (value := metadata.real(name)) is not None), None)


ARCHITECTURE = Architecture(
    hf=("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM", "MinistralForCausalLM"),
    gguf=(
        gguf.layout(
            "mistral3",
            hf="Ministral3ForCausalLM",
            model_type=_GROWING,
            interleaved=("attn_q", "attn_k"),
            config=_gguf_config,
            other_parts=("v.", "mm."),
        ),
    ),
    build=build,
    other_parts=("vision_tower.", "multi_modal_projector."),
)
