"""Qwen3.5-MoE: Qwen3.5 with mixtures of experts.

Source: transformers' `modeling_qwen3_5_moe`; llama.cpp `conversion/qwen.py`, Qwen3_5MoeTextModel.
"""

from collections.abc import Mapping

from models.arch import gated_delta, qwen3_next
from models.arch.base import Architecture, Model
from models.arch.experts import GGUF_NAMES, GGUF_SHARED
from models.config_reader import JSON
from models.ops.rope import with_axes


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    # Few say how wide a dense layer would be, for there is none.
    widths = [config.get(key) for key in ("intermediate_size", "shared_expert_intermediate_size")]
    config = with_axes(config, gated_delta.AXES, interleaved=True)
    return qwen3_next.build_as({**config, "intermediate_size": widths[0] or widths[1]}, fused=False)


ARCHITECTURE = Architecture(
    hf=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    gguf=(gated_delta.gguf_layout("qwen35moe", "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", GGUF_NAMES | GGUF_SHARED),),
    build=build,
    other_parts=gated_delta.OTHER_PARTS,
    told_by_tensors=gated_delta.told_by_tensors,
)
