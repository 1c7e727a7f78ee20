"""Hunyuan, the dense ones."""

from gguf_twin import Twin

from cases.base import Case, base, without

TWIN = Twin(
    "hunyuan-dense",
    {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
)


def _hunyuan(**more: object) -> dict[str, object]:
    said: dict[str, object] = {"head_dim": 8, "use_qk_norm": True, "use_cla": False, "mlp_bias": False}
    return base("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", **said | {"attention_bias": False} | more)


def _stretched(alpha: float) -> dict[str, object]:
    scaling = {"alpha": alpha, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {"rope_scaling": scaling | {"type": "dynamic"}}


CASES = (
    Case(
        "hunyuan_v1_dense",
        _hunyuan(intermediate_size=64, attention_head_dim=8, rope_theta=50.0, tie_word_embeddings=True)
        | _stretched(20.0),
        matters=(_stretched(1.0), {"rope_theta": 10000.0}),
        gguf=TWIN,
        quantized=("Q8_0",),
    ),
    Case(
        "hunyuan_v1_dense_bias",
        without(_hunyuan(attention_bias=True, rope_theta=500.0), "num_key_value_heads"),
        matters=({"rope_theta": 10000.0},),
    ),
    Case(
        "hunyuan_v1_dense_plain",
        _hunyuan(num_hidden_layers=2, head_dim=12, rope_theta=100.0),
        matters=({"rope_theta": 10000.0},),
        gguf=TWIN,
    ),
)
