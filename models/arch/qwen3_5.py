"""Qwen3.5: the gated delta rule on most layers, and dense MLPs.

Source: transformers' `modeling_qwen3_5`; llama.cpp `conversion/qwen.py`, Qwen3_5TextModel.
"""

from collections.abc import Mapping

from models.arch import blocks, gated_delta
from models.arch.base import Architecture, Model
from models.config_reader import JSON
from models.ops.rope import with_axes


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = with_axes(config, gated_delta.AXES, interleaved=True)
    return gated_delta.build_with(config, lambda dims, index: blocks.mlp(dims, f"model.layers.{index}"), fused=False)


ARCHITECTURE = Architecture(
    hf=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    gguf=(gated_delta.gguf_layout("qwen35", "Qwen3_5ForCausalLM", "qwen3_5_text", {}),),
    build=build,
    other_parts=gated_delta.OTHER_PARTS,
    told_by_tensors=gated_delta.told_by_tensors,
)
