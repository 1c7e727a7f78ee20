"""Make the fixture of Gemma 3: see `making.py`.

python tests/parity_vision/make_gemma3.py
"""

from dataclasses import replace

from fixture import Arrays, Fixture, token_id, vocabulary
from making import make

SPECIAL = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
CONFIG = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "boi_token_index": token_id(SPECIAL, SPECIAL[0]),
    "eoi_token_index": token_id(SPECIAL, SPECIAL[1]),
    "image_token_index": token_id(SPECIAL, SPECIAL[2]),
    "mm_tokens_per_image": 9,
    "torch_dtype": "float32",
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": vocabulary(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 12,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "rope_theta": 20000.0,
        "rope_local_base_freq": 3000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 24,
        "patch_size": 4,
        "layer_norm_eps": 0.02,
        "vision_use_head": False,
    },
}
PROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 9,
    "image_std": [0.3, 0.45, 0.5],
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 24, "width": 24},
}


def as_published(tensors: Arrays) -> Arrays:
    """What this version of the library calls `vision_tower.` was `vision_tower.vision_model.` when it was published."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()}


GEMMA3 = Fixture(
    name="gemma3",
    config=CONFIG,
    files={
        "preprocessor_config.json": PROCESSOR,
        "processor_config.json": {"image_seq_length": 9, "processor_class": "Gemma3Processor"},
    },
    special=SPECIAL,
    placeholder="<start_of_image>",
    tokenizer={
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "extra_special_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "processor_class": "Gemma3Processor",
    },
    bos=True,
    published=as_published,
    less_one=r"language_model.*norm\.weight|mm_soft_emb_norm",
    matters=({"vision_config": {"layer_norm_eps": 1e-6}}, {"vision_config": {"num_attention_heads": 6}}),
    processor_matters=(
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"resample": 3}),
    ),
)
# Crops of a tall picture are looked at by themselves, and the words between them go into the prompt.
SCANNED = replace(
    GEMMA3,
    name="gemma3_pan_and_scan",
    files=GEMMA3.files
    | {
        "preprocessor_config.json": PROCESSOR
        | {
            "do_pan_and_scan": True,
            "pan_and_scan_max_num_crops": 3,
            "pan_and_scan_min_crop_size": 20,
            "pan_and_scan_min_ratio_to_activate": 1.45,
            "resample": 3,
        }
    },
    told=(
        "do_pan_and_scan",
        "pan_and_scan_max_num_crops",
        "pan_and_scan_min_crop_size",
        "pan_and_scan_min_ratio_to_activate",
    ),
    processor_matters=(
        ("preprocessor_config.json", {"do_pan_and_scan": False}),
        ("preprocessor_config.json", {"pan_and_scan_min_crop_size": 40}),
        ("preprocessor_config.json", {"pan_and_scan_max_num_crops": 1}),
        ("preprocessor_config.json", {"pan_and_scan_min_ratio_to_activate": 1.2}),
        ("preprocessor_config.json", {"resample": 2}),
    ),
)

if __name__ == "__main__":
    for fixture in (GEMMA3, SCANNED):
        make(fixture)
