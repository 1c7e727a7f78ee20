"""Qwen3-VL-MoE: a Qwen3-VL with mixtures of experts.

Source: transformers' `modeling_qwen3_vl_moe`, and its `conversion_mapping` for how experts are stored; llama.cpp
`conversion/qwenvl.py`.
"""

import re
from collections.abc import Mapping

from models.arch import blocks, qwen3_moe, qwen3_vl
from models.arch.base import Architecture, Model, Shapes, Stack
from models.arch.experts import GGUF_NAMES, STACKS
from models.arch.gguf import layout
from models.config_reader import JSON, ConfigReader

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"
_AS_PUBLISHED = tuple(
    Stack(rf"(.*){name}", tuple(f"{{0}}.experts.{{n}}.{part}_proj.weight" for part in parts), transposed=True)
    for name, parts in ((re.escape(_GATE_UP), ("gate", "up")), (re.escape(_DOWN), ("down",)))
)


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, {"norm_topk_prob": True})
    transposed = ConfigReader(config).flag("transposed_experts", default=False)
    return qwen3_vl.build_with(config, qwen3_moe.layers, (*_AS_PUBLISHED, *STACKS) if transposed else STACKS)


def told_by_tensors(shapes: Shapes) -> dict[str, JSON]:
    """Whether experts are stored as (inputs, outputs), as published ones are and others are not.

    Then the model's width is the second axis of what goes up and the third of what comes down.
    """
    up, down = (next((shape for name, shape in shapes.items() if name.endswith(end)), ()) for end in (_GATE_UP, _DOWN))
    return {"transposed_experts": bool(up) and up[1:2] == down[2:3]}


ARCHITECTURE = Architecture(
    hf=("Qwen3VLMoeForConditionalGeneration",),
    gguf=(
        layout(
            "qwen3vlmoe",
            hf="Qwen3VLMoeForConditionalGeneration",
            model_type="qwen3_vl_moe",
            config=lambda metadata: qwen3_vl.gguf_config(metadata, qwen3_moe.gguf_config(metadata)),
            other_parts=qwen3_vl.GGUF_PARTS,
            attn_q_norm="self_attn.q_norm",
            attn_k_norm="self_attn.k_norm",
            names=GGUF_NAMES,
        ),
    ),
    build=build,
    other_parts=qwen3_vl.OTHER_PARTS,
    told_by_tensors=told_by_tensors,
)
