"""SmolLM3."""

from gguf_twin import Twin

from cases.base import Case, base, without

CASES = (
    Case(
        "smollm3",
        base(
            "SmolLM3ForCausalLM",
            "smollm3",
            num_hidden_layers=4,
            attention_bias=True,
            mlp_bias=False,
            tie_word_embeddings=True,
            rope_theta=500.0,
            no_rope_layers=[1, 0, 1, 0],
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        ),
        matters=(
            {"no_rope_layers": [1, 1, 1, 0]},
            {"layer_types": ["full_attention"] * 4},
            {"sliding_window": 8},
            {"rope_theta": 10000.0},
        ),
    ),
    Case(
        "smollm3_defaults",
        without(
            base("SmolLM3ForCausalLM", "smollm3", num_hidden_layers=4, intermediate_size=64, rope_theta=500.0)
            | {"tie_word_embeddings": True},
            "use_cache",
        ),
        matters=({"no_rope_layer_interval": 2},),
        gguf=Twin("smollm3", interleaved=("q_proj", "k_proj")),
    ),
)
