"""ERNIE 4.5, the dense ones."""

from gguf_twin import Twin

from cases.base import Case, base, without


def _ernie(**more: object) -> dict[str, object]:
    said: dict[str, object] = {"use_bias": False, "head_dim": 8, "rope_theta": 500.0, "rope_scaling": None}
    return base("Ernie4_5ForCausalLM", "ernie4_5", **said | {"tie_word_embeddings": True} | more)


CASES = (
    Case(
        "ernie4_5",
        _ernie(intermediate_size=64, head_dim=16),
        matters=({"rope_theta": 10000.0}, {"rms_norm_eps": 0.1}),
        gguf=Twin("ernie4_5"),
        quantized=("Q8_0",),
    ),
    Case(
        "ernie4_5_bias",
        without(_ernie(use_bias=True, num_key_value_heads=1), "rope_theta"),
        matters=({"rope_theta": 50.0},),
    ),
    Case(
        "ernie4_5_untied",
        _ernie(use_bias=True, tie_word_embeddings=False, num_hidden_layers=2),
        gguf=Twin("ernie4_5"),
    ),
)
