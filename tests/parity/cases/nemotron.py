"""Nemotron and Minitron, the dense ones."""

from gguf_twin import Twin

from cases.base import Case, base, without


def _nemotron(**more: object) -> dict[str, object]:
    said: dict[str, object] = {
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 0.5,
        "rope_theta": 500.0,
    }
    return without(base("NemotronForCausalLM", "nemotron"), "rms_norm_eps") | said | more


CASES = (
    Case(
        "nemotron",
        _nemotron(intermediate_size=64, norm_eps=1e-2),
        matters=(
            {"norm_eps": 1e-5},
            {"rope_theta": 10000.0},
            {"partial_rotary_factor": 1.0},
            {"hidden_act": "relu"},
        ),
        gguf=Twin("nemotron", norm_shift=1.0),
        quantized=("Q8_0",),
        norms_add=1.0,
    ),
    Case(
        "nemotron_bias",
        _nemotron(attention_bias=True, mlp_bias=True, hidden_act="silu", head_dim=12, tie_word_embeddings=True),
        matters=({"hidden_act": "relu2"}, {"rope_theta": 50.0}),
        norms_add=1.0,
    ),
)
