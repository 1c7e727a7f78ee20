"""Llama and SmolLM2."""

from gguf_twin import Twin

from cases.base import Case, base, without

TWIN = Twin("llama", interleaved=("q_proj", "k_proj"))


def _llama(**more: object) -> dict[str, object]:
    return base("LlamaForCausalLM", "llama", attention_bias=False, attention_dropout=0.0, mlp_bias=False, **more)


LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
YARN_PARAMETERS = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 1.0,
    "beta_slow": 0.25,
    "attention_factor": 1.3,
}

CASES = (
    Case(
        "llama_tied",
        without(
            _llama(num_hidden_layers=2, tie_word_embeddings=True) | {"rms_norm_eps": 1e-2},
            "num_key_value_heads",
            "torch_dtype",
        ),
        matters=({"rms_norm_eps": 1e-5}, {"rope_theta": 500.0}),
    ),
    Case("llama_untied_sharded", _llama(num_hidden_layers=2, rope_scaling=None, head_dim=8), shards=2, stray=True),
    Case("llama_gqa", _llama(num_hidden_layers=2, intermediate_size=64), gguf=TWIN, quantized=("Q8_0", "Q4_0")),
    Case(
        "llama_bias", _llama(num_hidden_layers=2, tie_word_embeddings=True) | {"attention_bias": True, "mlp_bias": True}
    ),
    Case("llama_head_dim", _llama(num_hidden_layers=2, head_dim=16, num_key_value_heads=1, tie_word_embeddings=True)),
    Case(
        "llama_rope_llama3",
        _llama(
            num_hidden_layers=2, head_dim=16, rope_theta=500.0, rope_scaling=LLAMA3_SCALING, tie_word_embeddings=True
        ),
        matters=(
            {"rope_scaling": None},
            {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 2.0}},
            {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 2.0}},
            {"rope_scaling": LLAMA3_SCALING | {"original_max_position_embeddings": 96}},
        ),
        gguf=TWIN,
    ),
    Case(
        "llama_rope_linear",
        _llama(num_hidden_layers=2, tie_word_embeddings=True, rope_scaling={"type": "linear", "factor": 2.5}),
        matters=({"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ),
    Case(
        "llama_rope_yarn",
        without(
            _llama(num_hidden_layers=2, head_dim=16, max_position_embeddings=96, rope_parameters=YARN_PARAMETERS),
            "rope_theta",
        ),
        matters=(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            {"rope_parameters": YARN_PARAMETERS | {"beta_fast": 2.0}},
            {"rope_parameters": YARN_PARAMETERS | {"beta_slow": 0.1}},
            {"rope_parameters": YARN_PARAMETERS | {"attention_factor": 1.0}},
            {"rope_parameters": YARN_PARAMETERS | {"rope_theta": 10000.0}},
        ),
    ),
    Case(
        "smollm2",
        _llama(
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=100000,
            rope_scaling=None,
            rope_interleaved=False,
            is_llama_config=True,
            tie_word_embeddings=True,
            pretraining_tp=1,
        ),
    ),
)
