"""Qwen2 and Qwen3."""

from gguf_twin import Twin

from cases.base import Case, base, without


def _qwen2(**more: object) -> dict[str, object]:
    return base("Qwen2ForCausalLM", "qwen2", attention_dropout=0.0) | {"rms_norm_eps": 1e-6} | more


def _qwen3(**more: object) -> dict[str, object]:
    config = base("Qwen3ForCausalLM", "qwen3", attention_bias=False, attention_dropout=0.0, head_dim=16)
    return config | {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "num_hidden_layers": 2} | more


QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES = (
    Case(
        "qwen2",
        _qwen2(
            intermediate_size=64, num_hidden_layers=2, sliding_window=8, use_sliding_window=False, max_window_layers=1
        ),
        gguf=Twin("qwen2"),
    ),
    Case(
        "qwen2_window",
        _qwen2(
            num_hidden_layers=4,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=2,
        ),
        matters=(
            {"use_sliding_window": False},
            {"sliding_window": 7},
            {"max_window_layers": 1},
            {"max_window_layers": 3},
        ),
    ),
    Case(
        "qwen3",
        _qwen3(tie_word_embeddings=True, use_sliding_window=False, sliding_window=None, max_window_layers=2),
        stray=True,
    ),
    Case(
        "qwen3_yarn",
        _qwen3(rope_theta=1000.0, rope_scaling=QWEN_YARN),
        matters=(
            {"rope_scaling": None},
            {"rope_scaling": QWEN_YARN | {"factor": 2.0}},
            {"rope_scaling": QWEN_YARN | {"original_max_position_embeddings": 96}},
        ),
        gguf=Twin("qwen3"),
    ),
    Case(
        "qwen3_layer_types",
        without(
            _qwen3(
                num_hidden_layers=3,
                head_dim=8,
                attention_bias=True,
                tie_word_embeddings=True,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                use_sliding_window=True,
                sliding_window=5,
                max_window_layers=3,
                dtype="float32",
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            ),
            "rope_theta",
            "torch_dtype",
        ),
        matters=(
            {"layer_types": ["full_attention"] * 3},
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            {"sliding_window": 6},
        ),
    ),
)
