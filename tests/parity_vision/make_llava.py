"""Make the fixtures of LLaVA with a CLIP tower: see `making.py`.

python tests/parity_vision/make_llava.py
"""

from dataclasses import replace

from fixture import Arrays, Fixture, merged, token_id, vocabulary
from make_mistral3 import as_since
from making import make

SPECIAL = ("<image>",)
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "image_size": 20,
    "intermediate_size": 40,
    "layer_norm_eps": 0.02,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "patch_size": 5,
    "projection_dim": 16,
}
PINPOINTS = [[40, 40], [20, 60], [60, 20]]
IMAGES = {
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.3, 0.45, 0.5],
    "rescale_factor": 1 / 255,
}


def named_twice(stored: Arrays) -> Arrays:
    """With the name that the tower's tensors have in published checkpoints."""
    return {name.replace("vision_tower.", "vision_tower.vision_model.", 1): value for name, value in stored.items()}


# The published 7B in small: older names, the last but one layer, no class token; a crop that leaves something out.
LLAVA = Fixture(
    name="llava",
    config={
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": token_id(SPECIAL, "<image>"),
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "torch_dtype": "float32",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocabulary(SPECIAL),
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "rms_norm_eps": 0.003,
        },
        "vision_config": VISION,
    },
    files={
        "preprocessor_config.json": {
            **IMAGES,
            "crop_size": {"height": 20, "width": 20},
            "image_processor_type": "CLIPImageProcessor",
            "resample": 2,
            "size": {"shortest_edge": 23},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 5,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    },
    special=SPECIAL,
    placeholder="<image>",
    tokenizer={"image_token": "<image>", "processor_class": "LlavaProcessor"},
    bos=True,
    idle=r"encoder\.layers\.2\.|post_layernorm",
    matters=(
        {"vision_config": {"layer_norm_eps": 1e-5}},
        {"vision_config": {"hidden_act": "gelu"}},
        {"vision_feature_layer": -1},
    ),
    processor_matters=(
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"resample": 3}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 20}}),
    ),
    published=named_twice,
)
# Two layers' features side by side, the class token among them, an ordinary gelu, no biases behind; a Qwen2 speaks,
# and pictures made square with the mean's colour around.
FULL = Fixture(
    name="llava_full",
    config={
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": token_id(SPECIAL, "<image>"),
        "model_type": "llava",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "silu",
        "torch_dtype": "float32",
        "vision_feature_layer": [1, -1],
        "vision_feature_select_strategy": "full",
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": vocabulary(SPECIAL),
            "hidden_size": 32,
            "intermediate_size": 48,
            "max_position_embeddings": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 700.0,
            "tie_word_embeddings": True,
        },
        "vision_config": VISION | {"hidden_act": "gelu"},
    },
    files={
        "preprocessor_config.json": {
            **IMAGES,
            "crop_size": {"height": 20, "width": 20},
            "do_pad": True,
            "image_processor_type": "LlavaImageProcessor",
            "resample": 3,
            "size": {"shortest_edge": 18},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 5,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "full",
        },
    },
    special=SPECIAL,
    placeholder="<image>",
    tokenizer={"image_token": "<image>", "processor_class": "LlavaProcessor"},
    idle="post_layernorm",
    matters=({"vision_feature_layer": [2, -1]}, {"vision_config": {"hidden_act": "quick_gelu"}}),
    processor_matters=(("preprocessor_config.json", {"do_pad": False}),),
    published=lambda stored: as_since(named_twice(stored)),
)

# The whole picture and tiles of it, by sizes of which one is square and one is a line of three.
NEXT = replace(
    LLAVA,
    name="llava_next",
    config=merged(
        LLAVA.config,
        {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_grid_pinpoints": PINPOINTS,
            "model_type": "llava_next",
            "tie_word_embeddings": False,
            "text_config": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
        },
    ),
    files={
        "preprocessor_config.json": {
            **IMAGES,
            "crop_size": {"height": 20, "width": 20},
            "do_pad": True,
            "image_grid_pinpoints": PINPOINTS,
            "image_processor_type": "LlavaNextImageProcessor",
            "resample": 2,
            "size": {"shortest_edge": 20},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 5,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
    },
    tokenizer={"image_token": "<image>", "processor_class": "LlavaNextProcessor"},
    matters=({"vision_config": {"layer_norm_eps": 1e-5}}, {"vision_feature_layer": -1}),
    processor_matters=(("preprocessor_config.json", {"resample": 3}),),
)

if __name__ == "__main__":
    for fixture in (LLAVA, FULL, NEXT):
        make(fixture)
