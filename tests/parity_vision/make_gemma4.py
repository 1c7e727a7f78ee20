"""Make the fixtures of Gemma 4: see `making.py`.

python tests/parity_vision/make_gemma4.py
"""

from making import Fixture, make, token_id, vocabulary

SPECIAL = ("<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio>", "<audio|>", "<|audio|>")
KINDS = ["sliding_attention", "full_attention"]
TOKENS = {
    "boi_token_id": token_id(SPECIAL, "<|image>"),
    "eoi_token_id": token_id(SPECIAL, "<image|>"),
    "image_token_id": token_id(SPECIAL, "<|image|>"),
    "video_token_id": token_id(SPECIAL, "<|video|>"),
    "boa_token_id": token_id(SPECIAL, "<|audio>"),
    "eoa_token_index": token_id(SPECIAL, "<audio|>"),
    "audio_token_id": token_id(SPECIAL, "<|audio|>"),
}
WORDS = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}
TEXT = {
    "model_type": "gemma4_text",
    "vocab_size": vocabulary(SPECIAL),
    "vocab_size_per_layer_input": vocabulary(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": None,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "final_logit_softcapping": 9.0,
    "pad_token_id": 3,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 900.0},
    },
}
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 3,
    "pooling_kernel_size": 2,
    "position_embedding_size": 48,
}
IMAGES = {
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_processor_type": "Gemma4ImageProcessor",
    "image_seq_length": 70,
    "image_std": [1.0, 1.0, 1.0],
    "max_soft_tokens": 70,
    "patch_size": 3,
    "pooling_kernel_size": 2,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
OTHERS = {
    "audio_ms_per_token": 40,
    "audio_seq_length": 750,
    "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "feature_size": 128},
    "image_seq_length": 70,
    "processor_class": "Gemma4Processor",
    "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
}
# As the small ones: clipped matrices, embeddings for each layer, shared keys, and pictures are looked back at.
SMALL = Fixture(
    name="gemma4_vl",
    config={
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        **TOKENS,
        "torch_dtype": "float32",
        "audio_config": None,
        "text_config": {
            **TEXT,
            "num_hidden_layers": 4,
            "layer_types": [*KINDS, *KINDS],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "sliding_window": 24,
            "use_bidirectional_attention": None,
        },
        "vision_config": {
            **VISION,
            "rms_norm_eps": 0.01,
            "rope_parameters": {"rope_theta": 20.0, "rope_type": "axial"},
            "use_clipped_linears": True,
        },
    },
    files={"processor_config.json": {**OTHERS, "image_processor": IMAGES}},
    special=SPECIAL,
    placeholder="<|image|>",
    tokenizer={**WORDS, "extra_special_tokens": WORDS, "processor_class": "Gemma4Processor"},
    bos=True,
    matters=(
        {"vision_config": {"rms_norm_eps": 1e-6}},
        {"vision_config": {"rope_parameters": {"rope_theta": 100.0}}},
        {"vision_config": {"hidden_activation": "silu"}},
        {"vision_config": {"use_clipped_linears": False}},
        {"text_config": {"pad_token_id": 5}},
    ),
    processor_matters=(("processor_config.json", {"image_processor": {"resample": 2}}),),
)
# As the large ones: pictures look at themselves both ways where layers slide, farther than the window reaches.
LARGE = Fixture(
    name="gemma4_vl_two_way",
    config={
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        **TOKENS,
        "torch_dtype": "float32",
        "audio_config": None,
        "text_config": {
            **TEXT,
            "num_hidden_layers": 3,
            "layer_types": [KINDS[0], KINDS[0], KINDS[1]],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 12,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {**VISION, "hidden_activation": "gelu", "num_key_value_heads": 4, "standardize": True},
    },
    files={
        "preprocessor_config.json": {**IMAGES, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3]},
        "processor_config.json": OTHERS,
    },
    special=SPECIAL,
    placeholder="<|image|>",
    tokenizer={**WORDS, "extra_special_tokens": WORDS, "processor_class": "Gemma4Processor"},
    bos=True,
    matters=(
        {"vision_config": {"standardize": False}},
        {"text_config": {"use_bidirectional_attention": None}},
        {"text_config": {"sliding_window": 200}},
    ),
    processor_matters=(
        ("preprocessor_config.json", {"do_normalize": False}),
        ("preprocessor_config.json", {"max_soft_tokens": 140}),
    ),
)

if __name__ == "__main__":
    for fixture in (SMALL, LARGE):
        make(fixture)
