"""Granite 3."""

from collections.abc import Mapping

import gguf
from gguf_twin import Twin

from cases.base import Case, base


def write_factors(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _granite(**more: object) -> dict[str, object]:
    factors = {
        "attention_multiplier": 0.25,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.5,
    }
    config = base("GraniteForCausalLM", "granite", attention_bias=False, mlp_bias=False, num_hidden_layers=3)
    return config | factors | more


MATTERS = (
    {"attention_multiplier": 0.5},
    {"embedding_multiplier": 1.0},
    {"residual_multiplier": 1.0},
    {"logits_scaling": 1.0},
)

CASES = (
    Case(
        "granite",
        _granite(intermediate_size=64, rope_theta=500.0),
        matters=(*MATTERS, {"rope_theta": 10000.0}),
        gguf=Twin("granite", interleaved=("q_proj", "k_proj"), metadata=write_factors),
        quantized=("Q8_0",),
    ),
    Case(
        "granite_bias",
        _granite(attention_bias=True, mlp_bias=True, embedding_multiplier=3.0, rope_scaling=None),
        matters=MATTERS,
    ),
)
