"""Phi-3, Phi-3.5 and Phi-4."""

from collections.abc import Mapping

import gguf
from gguf_twin import Twin

from cases.base import Case, base


def write_window_and_original_context(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    writer.add_sliding_window(config["sliding_window"] or 0)
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])


TWIN = Twin(
    "phi3",
    {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    metadata=write_window_and_original_context,
)
SHORT = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5]
LONG = [1.2, 1.7, 2.6, 4.1, 6.0, 9.0]


def _phi3(**more: object) -> dict[str, object]:
    return base("Phi3ForCausalLM", "phi3", num_hidden_layers=2, embd_pdrop=0.0, resid_pdrop=0.0) | more


def _long(**more: object) -> dict[str, object]:
    scaling = {"type": "longrope", "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG} | more
    return {"rope_scaling": scaling}


CASES = (
    Case(
        "phi3",
        _phi3(intermediate_size=64, sliding_window=8, original_max_position_embeddings=128),
        matters=({"sliding_window": None}, {"sliding_window": 9}, {"rope_theta": 500.0}),
        gguf=TWIN,
        quantized=("Q8_0",),
    ),
    # A row may have 128 tokens in the tests: less than the original context here, and more in the next.
    Case(
        "phi3_longrope",
        _phi3(
            hidden_size=64,
            sliding_window=None,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=256,
            max_position_embeddings=1024,
            rope_theta=100.0,
            **_long(attention_factor=1.3),
        ),
        matters=(
            {"partial_rotary_factor": 0.75, **_long(attention_factor=1.0)},
            _long(attention_factor=1.3, short_factor=LONG),
            {"rope_theta": 500.0},
        ),
        gguf=TWIN,
    ),
    Case(
        "phi3_longrope_beyond",
        _phi3(
            num_attention_heads=2,
            num_key_value_heads=1,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rope_theta=100.0,
            **_long(attention_factor=1.2),
        ),
        matters=(_long(attention_factor=1.2, long_factor=SHORT), {"original_max_position_embeddings": 64}),
    ),
)
