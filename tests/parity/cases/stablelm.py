"""StableLM."""

from collections.abc import Mapping

import gguf
from gguf_twin import Twin

from cases.base import Case, base, without


def write_branches(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    """The converter says that branches are side by side where a config.json says nothing of it."""
    writer.add_parallel_residual("use_parallel_residual" not in config)


def _stablelm(**more: object) -> dict[str, object]:
    said: dict[str, object] = {
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "rope_theta": 500.0,
        "use_parallel_residual": False,
        "use_qkv_bias": True,
    }
    return without(base("StableLmForCausalLM", "stablelm"), "rms_norm_eps") | said | more


CASES = (
    Case(
        "stablelm",
        _stablelm(intermediate_size=64, layer_norm_eps=1e-2, num_key_value_heads=4),
        matters=({"layer_norm_eps": 1e-5}, {"partial_rotary_factor": 1.0}),
        gguf=Twin("stablelm", metadata=write_branches),
        quantized=("Q8_0",),
    ),
    Case(
        "stablelm_plain",
        without(
            _stablelm(use_qkv_bias=False, hidden_act="gelu", partial_rotary_factor=0.5, num_hidden_layers=2),
            "use_parallel_residual",
        ),
        matters=({"hidden_act": "silu"}, {"rope_theta": 10000.0}),
    ),
)
