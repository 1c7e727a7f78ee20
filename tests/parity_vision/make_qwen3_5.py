"""Make the fixtures of Qwen3.5's, dense and with experts: see `making.py`.

python tests/parity_vision/make_qwen3_5.py
"""

from dataclasses import replace

import make_qwen3_vl as qwen3_vl
from fixture import vocabulary
from making import make
from qwen import SPECIAL, ids

TEXT = {
    "attention_bias": False,
    "attn_output_gate": True,
    "dtype": "float32",
    "full_attention_interval": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 512,
    "model_type": "qwen3_5_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    # Where a head says next to nothing, its norm makes much of the last bits.
    "rms_norm_eps": 1e-3,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 2, 1],
        "partial_rotary_factor": 0.75,
        "rope_theta": 4000.0,
        "rope_type": "default",
    },
    "vocab_size": vocabulary(SPECIAL),
}
TOWER = qwen3_vl.TOWER | {
    "deepstack_visual_indexes": [],
    "depth": 2,
    "model_type": "qwen3_5",
    "num_position_embeddings": 36,
}
DENSE = replace(
    qwen3_vl.DENSE,
    name="qwen3_5_vl",
    config={
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        **ids(),
        "text_config": TEXT,
        "tie_word_embeddings": True,
        "vision_config": TOWER,
    },
    less_one=r"language_model.*(layernorm|model\.norm|[qk]_norm)\.weight",
    matters=(
        {"text_config": {"rope_parameters": {"mrope_section": [4, 1, 1]}}},
        {"text_config": {"rope_parameters": {"partial_rotary_factor": 0.5}}},
        {"vision_config": {"num_heads": 6}},
    ),
    processor_matters=(
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"size": {"longest_edge": 2000}}),
    ),
)
EXPERTS = replace(
    DENSE,
    name="qwen3_5_moe_vl",
    config={
        **DENSE.config,
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {
            **{key: value for key, value in TEXT.items() if key != "intermediate_size"},
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 20,
        },
        "vision_config": {**TOWER, "model_type": "qwen3_5_moe"},
    },
    matters=({"text_config": {"num_experts_per_tok": 1}},),
    processor_matters=(),
)

if __name__ == "__main__":
    for fixture in (DENSE, EXPERTS):
        make(fixture)
