"""Make the fixtures of Idefics3 and SmolVLM: see `making.py`.

python tests/parity_vision/make_idefics3.py
"""

from dataclasses import replace

from fixture import Fixture, merged, token_id, vocabulary
from making import make

ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
SPECIAL = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *ROWS)
CONFIG = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "model_type": "idefics3",
    "image_token_id": token_id(SPECIAL, "<image>"),
    "pad_token_id": 3,
    "scale_factor": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "text_config": {
        "model_type": "llama",
        "vocab_size": vocabulary(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 3000.0,
        "max_position_embeddings": 512,
        "pad_token_id": 3,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "idefics3_vision",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 24,
        "patch_size": 4,
        "layer_norm_eps": 0.02,
    },
}
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_processor_type": "Idefics3ImageProcessor",
    "image_std": [0.3, 0.45, 0.5],
    "max_image_size": {"longest_edge": 24},
    "processor_class": "Idefics3Processor",
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 46},
}
IDEFICS3 = Fixture(
    name="idefics3",
    config=CONFIG,
    files={
        "preprocessor_config.json": PREPROCESSOR,
        "processor_config.json": {"image_seq_len": 9, "processor_class": "Idefics3Processor"},
    },
    special=SPECIAL,
    placeholder="<image>",
    tokenizer={"processor_class": "Idefics3Processor", "additional_special_tokens": list(SPECIAL[:4])},
    matters=({"vision_config": {"layer_norm_eps": 1e-6}}, {"vision_config": {"num_attention_heads": 6}}),
    processor_matters=(
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"resample": 3}),
        ("preprocessor_config.json", {"size": {"longest_edge": 60}}),
        ("preprocessor_config.json", {"do_image_splitting": False}),
    ),
)
# Its own processor wants a package for videos; what it does to pictures is the other's. The tower has seen larger
# pictures than these, so that a picture's rows and columns are spread over its table of positions.
SMOLVLM = replace(
    IDEFICS3,
    name="smolvlm",
    config=merged(
        CONFIG,
        {
            "architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": "smolvlm",
            "text_config": {"rms_norm_eps": 0.003},
            "vision_config": {"model_type": "smolvlm_vision"},
        },
    ),
    files={
        "preprocessor_config.json": PREPROCESSOR
        | {
            "do_image_splitting": False,
            "image_processor_type": "SmolVLMImageProcessor",
            "max_image_size": {"longest_edge": 16},
            "resample": 3,
        },
        "processor_config.json": {"image_seq_len": 4, "processor_class": "Idefics3Processor"},
    },
    matters=({"vision_config": {"layer_norm_eps": 1e-6}}, {"text_config": {"rms_norm_eps": 1e-6}}),
    processor_matters=(
        ("preprocessor_config.json", {"resample": 1}),
        ("preprocessor_config.json", {"size": {"longest_edge": 20}}),
    ),
)

if __name__ == "__main__":
    for fixture in (IDEFICS3, SMOLVLM):
        make(fixture)
