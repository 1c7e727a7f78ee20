"""Qwen3-Next: the gated delta rule on most layers, mixtures of experts on all but those that the config names.

Source: transformers' `modeling_qwen3_next`; llama.cpp `conversion/qwen.py`, Qwen3NextModel.
"""

from collections.abc import Mapping

from models.arch import blocks, gated_delta
from models.arch.base import Architecture, Model
from models.arch.experts import GGUF_NAMES, GGUF_SHARED, is_sparse, mixture_beside_one
from models.config_reader import JSON


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    return build_as(config, fused=True)


def build_as(config: Mapping[str, JSON], *, fused: bool) -> Model:
    """The model, its layers' inputs stored one way or the other. Raises CheckpointError."""

    def mlp(dims: blocks.Dims, index: int) -> blocks.MLP | blocks.MoE:
        name = f"model.layers.{index}"
        if not is_sparse(config, index):
            return blocks.mlp(dims, name)
        return mixture_beside_one(config, dims, f"{name}.mlp", normalized=True)

    return gated_delta.build_with(config, mlp, fused=fused)


ARCHITECTURE = Architecture(
    hf=("Qwen3NextForCausalLM", "Qwen3NextMoeForCausalLM"),
    gguf=(gated_delta.gguf_layout("qwen3next", "Qwen3NextForCausalLM", "qwen3_next", GGUF_NAMES | GGUF_SHARED),),
    build=build,
    told_by_tensors=gated_delta.told_by_tensors,
)
