"""Qwen2-VL and Qwen2.5-VL: a Qwen2 whose positions have axes, beside a tower of pictures.

Source: M-RoPE (arXiv 2409.12191); transformers' `modeling_qwen2_vl` and `modeling_qwen2_5_vl`; llama.cpp
`conversion/qwenvl.py`, Qwen2VLModel; Ollama v0.24 `convert_qwen25vl.go`, which writes the tower into the same file.
"""

from collections.abc import Mapping

from models.arch import blocks, qwen2
from models.arch.base import Architecture, Model
from models.arch.gguf import Config, layout, windowed_config, with_axes
from models.config_reader import JSON
from models.gguf_metadata import GGUFMetadata
from models.ops import rope

DEFAULTS: Mapping[str, JSON] = {
    "max_position_embeddings": 32768,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
}
_SECTIONS = (16, 24, 24)


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    return qwen2.build(rope.with_axes(blocks.completed(config, DEFAULTS), _SECTIONS, interleaved=False))


def _gguf_config(metadata: GGUFMetadata) -> Config:
    return with_axes(windowed_config(metadata), metadata)


ARCHITECTURE = Architecture(
    hf=("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    gguf=(
        layout(
            "qwen2vl",
            "qwen25vl",
            hf="Qwen2_5_VLForConditionalGeneration",
            model_type="qwen2_5_vl",
            config=_gguf_config,
            other_parts=("v.", "mm."),
        ),
    ),
    build=build,
    other_parts=("visual.", "vision_tower."),
)
