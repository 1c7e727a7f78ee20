"""Make the fixtures of Pixtral's tower, in Mistral 3 and in a LLaVA: see `making.py`.

Pixtral's processor wants torchvision besides, if only to be imported.

    python tests/parity_vision/make_mistral3.py
"""

from fixture import Arrays, Fixture, token_id, vocabulary
from making import make

SPECIAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
VISION = {
    "model_type": "pixtral",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 8,
    "hidden_act": "silu",
    "image_size": 48,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": vocabulary(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
}
IMAGES = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_processor_type": "PixtralImageProcessor",
    "image_std": [0.3, 0.45, 0.5],
    "processor_class": "PixtralProcessor",
    "rescale_factor": 1 / 255,
}
PROCESSOR = {
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
    "image_token": "[IMG]",
    "processor_class": "PixtralProcessor",
}


def as_since(stored: Arrays) -> Arrays:
    """Names as transformers 4.52 and later wrote them for a while; published checkpoints have either."""
    made = {}
    for name, value in stored.items():
        if name.startswith("language_model.model."):
            made[name.replace("language_model.model.", "model.language_model.", 1)] = value
        else:
            made["lm_head.weight" if name == "language_model.lm_head.weight" else f"model.{name}"] = value
    return made


# Nine patches a place, and an odd projector; rope and merger as config.json says.
MISTRAL3 = Fixture(
    name="mistral3_vl",
    config={
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": token_id(SPECIAL, "[IMG]"),
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu_pytorch_tanh",
        "spatial_merge_size": 3,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vision_feature_layer": -1,
        "text_config": {
            **TEXT,
            "model_type": "mistral",
            "rms_norm_eps": 0.02,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
            "sliding_window": None,
        },
        "vision_config": {**VISION, "rope_parameters": {"rope_theta": 30.0, "rope_type": "axial"}},
    },
    files={
        "preprocessor_config.json": {
            **IMAGES,
            "patch_size": {"height": 4, "width": 4},
            "resample": 2,
            "size": {"longest_edge": 50},
        },
        "processor_config.json": {**PROCESSOR, "patch_size": 4, "spatial_merge_size": 3},
    },
    special=SPECIAL,
    placeholder="[IMG]",
    tokenizer={"processor_class": "PixtralProcessor"},
    bos=True,
    matters=(
        {"vision_config": {"rope_parameters": {"rope_theta": 10000.0}}},
        {"vision_config": {"hidden_act": "gelu"}},
        {"text_config": {"rms_norm_eps": 1e-6}},
        {"projector_hidden_act": "silu"},
        {"vision_feature_layer": 1},
    ),
    processor_matters=(
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"resample": 3}),
        ("preprocessor_config.json", {"size": {"longest_edge": 30}}),
    ),
    published=as_since,
)
# As mistral-community's Pixtral is published: a place a patch, and the last but one layer here.
PIXTRAL = Fixture(
    name="pixtral",
    config={
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": 1,
        "image_token_index": token_id(SPECIAL, "[IMG]"),
        "projector_hidden_act": "gelu",
        "torch_dtype": "float32",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
        "text_config": {
            **TEXT,
            "model_type": "mistral",
            "rms_norm_eps": 1e-5,
            "rope_theta": 300.0,
            "sliding_window": 24,
        },
        "vision_config": {**VISION, "num_hidden_layers": 3, "patch_size": 8, "rope_theta": 60.0, "hidden_act": "gelu"},
    },
    files={
        "preprocessor_config.json": {**IMAGES, "patch_size": 8, "resample": 3, "size": {"longest_edge": 60}},
        "processor_config.json": {**PROCESSOR, "patch_size": 8},
    },
    special=SPECIAL,
    placeholder="[IMG]",
    tokenizer={"processor_class": "PixtralProcessor"},
    bos=True,
    idle=r"vision_tower\.transformer\.layers\.2\.",
    matters=(
        {"vision_config": {"rope_theta": 10000.0}},
        {"vision_feature_layer": -1},
        {"text_config": {"sliding_window": 12}},
    ),
    processor_matters=(("preprocessor_config.json", {"size": {"longest_edge": 30}}),),
)

if __name__ == "__main__":
    for fixture in (MISTRAL3, PIXTRAL):
        make(fixture)
