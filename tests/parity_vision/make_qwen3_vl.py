"""Make the fixtures of Qwen3-VL, dense and with experts: see `making.py`.

python tests/parity_vision/make_qwen3_vl.py
"""

from dataclasses import replace
from functools import partial

from fixture import Fixture, vocabulary
from making import make
from qwen import PLACEHOLDER, SPECIAL, TOKENIZER, ids, still, transposed
from transformers import Qwen3VLProcessor

TEXT = {
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 1, 3], "rope_type": "default"},
    "rope_theta": 4000.0,
    "tie_word_embeddings": True,
    "vocab_size": vocabulary(SPECIAL),
}
TOWER = {
    "deepstack_visual_indexes": [0, 2],
    "depth": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 24,
    "in_channels": 3,
    "intermediate_size": 28,
    "model_type": "qwen3_vl",
    "num_heads": 3,
    "num_position_embeddings": 25,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
PROCESSOR = {
    "image_mean": [0.4, 0.5, 0.6],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_std": [0.3, 0.45, 0.5],
    "merge_size": 2,
    "patch_size": 4,
    "processor_class": "Qwen3VLProcessor",
    "size": {"longest_edge": 1400, "shortest_edge": 1000},
    "temporal_patch_size": 2,
}
DENSE = Fixture(
    name="qwen3_vl",
    config={
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **ids(),
        "text_config": TEXT,
        "tie_word_embeddings": True,
        "vision_config": TOWER,
    },
    files={"preprocessor_config.json": PROCESSOR},
    special=SPECIAL,
    placeholder=PLACEHOLDER,
    tokenizer=TOKENIZER | {"processor_class": "Qwen3VLProcessor"},
    processor=partial(still, Qwen3VLProcessor),
    idle=r"qkv\.bias",
    matters=(
        {"text_config": {"rope_scaling": {"mrope_section": [2, 3, 3]}}},
        {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
        {"vision_config": {"num_heads": 6}},
        {"vision_config": {"hidden_act": "relu"}},
    ),
    processor_matters=(
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"size": {"longest_edge": 2000}}),
    ),
)
# Windows of three by three patches of one frame, which pictures are made larger for; told in processor_config.json.
EXPERTS = replace(
    DENSE,
    name="qwen3_vl_moe",
    published=transposed,
    config={
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        **ids(),
        "text_config": {
            **TEXT,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
            "model_type": "qwen3_vl_moe_text",
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "rope_theta": 9000.0,
        },
        "tie_word_embeddings": True,
        "vision_config": {
            **TOWER,
            "deepstack_visual_indexes": [1],
            "depth": 2,
            "hidden_act": "gelu",
            "hidden_size": 16,
            "model_type": "qwen3_vl_moe",
            "num_heads": 2,
            "num_position_embeddings": 49,
            "spatial_merge_size": 3,
            "temporal_patch_size": 1,
        },
    },
    files={
        "preprocessor_config.json": PROCESSOR,
        "processor_config.json": {
            "image_processor": {
                **PROCESSOR,
                "merge_size": 3,
                "resample": 2,
                "size": {"longest_edge": 3300, "shortest_edge": 2900},
                "temporal_patch_size": 1,
            },
            "processor_class": "Qwen3VLProcessor",
        },
    },
    matters=(
        {"text_config": {"rope_scaling": {"mrope_section": [2, 3, 3]}}},
        {"text_config": {"num_experts_per_tok": 1}},
        {"vision_config": {"deepstack_visual_indexes": [0]}},
    ),
    processor_matters=(
        ("processor_config.json", {"image_processor": {"resample": 3}}),
        ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 1000}}}),
    ),
)

if __name__ == "__main__":
    for fixture in (DENSE, EXPERTS):
        make(fixture)
