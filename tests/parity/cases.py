"""What the fixtures are: one Case a folder, each for the features that its name says.

A configuration is written here as published checkpoints write theirs, not as the reference library would save it: old
and new spellings, absent keys, nulls and keys nobody reads are part of what a loader has to live with.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tiny_tokenizer import BOS, EOS, PAD, VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Case:
    """One fixture.

    `matters` lists changes of the configuration; each must change the logits, else the fixture could not see an
    implementation that ignores the feature.
    """

    name: str
    config: Mapping[str, object]
    matters: tuple[Mapping[str, object], ...] = ()
    shards: int = 1
    stray: bool = False
    """Carry tensors that published checkpoints carry and a loader must pass over."""
    gguf: bool = False
    quantized: tuple[str, ...] = ()


def _base(architecture: str, model_type: str, **more: object) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **more,
    }


def _llama(**more: object) -> dict[str, object]:
    return _base("LlamaForCausalLM", "llama", attention_bias=False, attention_dropout=0.0, mlp_bias=False, **more)


def _mistral(**more: object) -> dict[str, object]:
    return _base("MistralForCausalLM", "mistral", attention_dropout=0.0, **more)


def _qwen2(**more: object) -> dict[str, object]:
    return _base("Qwen2ForCausalLM", "qwen2", attention_dropout=0.0) | {"rms_norm_eps": 1e-6} | more


def _qwen3(**more: object) -> dict[str, object]:
    config = _base("Qwen3ForCausalLM", "qwen3", attention_bias=False, attention_dropout=0.0, head_dim=16)
    return config | {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "num_hidden_layers": 2} | more


def _without(config: Mapping[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in keys}


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
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

LLAMA = (
    Case(
        "llama_tied",
        _without(
            _llama(num_hidden_layers=2, tie_word_embeddings=True) | {"rms_norm_eps": 1e-2},
            "num_key_value_heads",
            "torch_dtype",
        ),
        matters=({"rms_norm_eps": 1e-5}, {"rope_theta": 500.0}),
    ),
    Case("llama_untied_sharded", _llama(num_hidden_layers=2, rope_scaling=None, head_dim=8), shards=2, stray=True),
    Case("llama_gqa", _llama(num_hidden_layers=2, intermediate_size=64), gguf=True, quantized=("Q8_0", "Q4_0")),
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
        gguf=True,
    ),
    Case(
        "llama_rope_linear",
        _llama(num_hidden_layers=2, tie_word_embeddings=True, rope_scaling={"type": "linear", "factor": 2.5}),
        matters=({"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ),
    Case(
        "llama_rope_yarn",
        _without(
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

MISTRAL = (
    Case(
        "mistral_window",
        _mistral(num_hidden_layers=2, sliding_window=8),
        matters=({"sliding_window": None}, {"sliding_window": 9}, {"sliding_window": 7}),
    ),
    Case(
        "mistral_head_dim",
        _mistral(
            tie_word_embeddings=True, num_hidden_layers=2, head_dim=12, sliding_window=None, rope_theta=1_000_000.0
        ),
    ),
)

QWEN = (
    Case(
        "qwen2",
        _qwen2(
            intermediate_size=64, num_hidden_layers=2, sliding_window=8, use_sliding_window=False, max_window_layers=1
        ),
        gguf=True,
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
        gguf=True,
    ),
    Case(
        "qwen3_layer_types",
        _without(
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

SMOLLM3 = (
    Case(
        "smollm3",
        _base(
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
        _without(
            _base("SmolLM3ForCausalLM", "smollm3", num_hidden_layers=4, intermediate_size=64, rope_theta=500.0)
            | {"tie_word_embeddings": True},
            "use_cache",
        ),
        matters=({"no_rope_layer_interval": 2},),
        gguf=True,
    ),
)

CASES = (*LLAMA, *MISTRAL, *QWEN, *SMOLLM3)
