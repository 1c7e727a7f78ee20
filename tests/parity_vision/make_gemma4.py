"""Make the fixtures of Gemma 4: see `making.py`.

python tests/parity_vision/make_gemma4.py
"""

from dataclasses import replace
from pathlib import Path

import pillow
from fixture import Fixture, token_id, vocabulary
from making import make
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    Gemma4AudioFeatureExtractor,
    Gemma4Processor,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedProcessor,
)

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
PER_LAYER_AND_EXPERTS = (
    "vocab_size_per_layer_input",
    "enable_moe_block",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
)
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


def processor(folder: Path) -> Gemma4Processor:
    """Put together by hand: of the processor of films there is none on Pillow."""
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=AutoVideoProcessor.from_pretrained(folder),
    )


class OnPillow(Gemma4UnifiedImageProcessor):
    """Resizes with Pillow, as the processors of all other models can."""

    def aspect_ratio_preserving_resize(self, image, patch_size, max_patches, pooling_kernel_size, resample):
        resized = super().aspect_ratio_preserving_resize(image, patch_size, max_patches, pooling_kernel_size, resample)
        return pillow.resized(image, *resized.shape[-2:], resample)


def unified_processor(folder: Path) -> Gemma4UnifiedProcessor:
    """See `processor`."""
    return Gemma4UnifiedProcessor(
        feature_extractor=Gemma4UnifiedAudioFeatureExtractor(),
        image_processor=OnPillow.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=AutoVideoProcessor.from_pretrained(folder),
    )


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
    processor=processor,
    matters=(
        {"vision_config": {"rms_norm_eps": 1e-6}},
        {"vision_config": {"rope_parameters": {"rope_theta": 100.0}}},
        {"vision_config": {"hidden_activation": "silu"}},
        {"text_config": {"pad_token_id": 5}},
    ),
    processor_matters=(("processor_config.json", {"image_processor": {"resample": 2}}),),
)
# As the large ones: pictures look at themselves both ways where layers slide, farther than the window reaches.
LARGE = replace(
    SMALL,
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
    matters=(
        {"text_config": {"use_bidirectional_attention": None}},
        {"text_config": {"sliding_window": 200}},
    ),
    processor_matters=(
        ("preprocessor_config.json", {"do_normalize": False}),
        ("preprocessor_config.json", {"max_soft_tokens": 140}),
    ),
)

# The one without a tower; a picture is shorter than the window, for beyond it transformers is of two minds.
UNIFIED = replace(
    SMALL,
    name="gemma4_unified_vl",
    config={
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        **TOKENS,
        "torch_dtype": "float32",
        "audio_config": None,
        "text_config": {
            **{key: value for key, value in TEXT.items() if key not in PER_LAYER_AND_EXPERTS},
            "model_type": "gemma4_unified_text",
            "num_hidden_layers": 3,
            "layer_types": [KINDS[0], KINDS[1], KINDS[1]],
            "num_kv_shared_layers": 0,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 80,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 3,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 24,
            "mm_posemb_size": 40,
            "output_proj_dims": 24,
            "rms_norm_eps": 0.02,
        },
    },
    files={
        "processor_config.json": {
            **OTHERS,
            "feature_extractor": {"feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor"},
            "image_processor": {**IMAGES, "image_processor_type": "Gemma4UnifiedImageProcessor"},
            "processor_class": "Gemma4UnifiedProcessor",
            "video_processor": {"video_processor_type": "Gemma4UnifiedVideoProcessor"},
        }
    },
    tokenizer={**SMALL.tokenizer, "processor_class": "Gemma4UnifiedProcessor"},
    processor=unified_processor,
    matters=(
        {"vision_config": {"rms_norm_eps": 1e-6}},
        {"text_config": {"use_bidirectional_attention": None}},
        {"text_config": {"sliding_window": 70}},
    ),
    processor_matters=(),
)

if __name__ == "__main__":
    for fixture in (SMALL, LARGE, UNIFIED):
        make(fixture)
