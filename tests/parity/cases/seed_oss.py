"""Seed-OSS."""

from gguf_twin import Twin

from cases.base import Case, base, without

TWIN = Twin("seed_oss", {"post_attention_layernorm": "post_attention_norm"})


def _seed_oss(**more: object) -> dict[str, object]:
    said: dict[str, object] = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "head_dim": 16}
    dropouts = {"attention_dropout": 0.1, "residual_dropout": 0.1}
    return base("SeedOssForCausalLM", "seed_oss", **said | dropouts | {"rope_theta": 500.0} | more)


CASES = (
    Case(
        "seed_oss",
        _seed_oss(intermediate_size=64, rope_scaling={"rope_type": "default"}),
        matters=({"rope_theta": 10000.0},),
        gguf=TWIN,
        quantized=("Q8_0",),
    ),
    Case(
        "seed_oss_biases",
        without(_seed_oss(attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True), "attention_bias"),
        gguf=TWIN,
    ),
    Case(
        "seed_oss_plain",
        without(_seed_oss(attention_bias=False, attention_out_bias=True, num_hidden_layers=2), "num_key_value_heads")
        | {"num_key_value_heads": None},
    ),
)
