"""Make the fixture of Qwen2.5-VL: see `making.py`.

python tests/parity_vision/make_qwen2_5_vl.py
"""

from functools import partial

from fixture import Fixture, token_id, vocabulary
from making import make
from qwen import PLACEHOLDER, SPECIAL, TOKENIZER, ids, older_names, still
from transformers import Qwen2_5_VLProcessor

CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    # As the first ones were published: what the text model is like stands beside the rest.
    **ids(),
    "vision_token_id": token_id(SPECIAL, "<|vision_pad|>"),
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "rope_theta": 4000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_sliding_window": False,
    "vocab_size": vocabulary(SPECIAL),
    "vision_config": {
        "depth": 4,
        "fullatt_block_indexes": [1, 2],
        "hidden_act": "silu",
        "hidden_size": 24,
        "in_chans": 3,
        "intermediate_size": 20,
        "num_heads": 3,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "spatial_patch_size": 4,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 24,
    },
}
PROCESSOR = {
    "image_mean": [0.4, 0.5, 0.6],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.3, 0.45, 0.5],
    "max_pixels": 1400,
    "merge_size": 2,
    "min_pixels": 1000,
    "patch_size": 4,
    "processor_class": "Qwen2_5_VLProcessor",
    "temporal_patch_size": 2,
}
FIXTURE = Fixture(
    name="qwen2_5_vl",
    config=CONFIG,
    files={"preprocessor_config.json": PROCESSOR},
    special=SPECIAL,
    placeholder=PLACEHOLDER,
    tokenizer=TOKENIZER | {"processor_class": "Qwen2_5_VLProcessor"},
    idle=r"qkv\.bias",
    published=older_names,
    processor=partial(still, Qwen2_5_VLProcessor),
    matters=(
        {"rope_scaling": {"mrope_section": [2, 1, 1]}},
        {"vision_config": {"window_size": 16}},
        {"vision_config": {"fullatt_block_indexes": [1, 3]}},
        {"vision_config": {"num_heads": 6}},
        {"vision_config": {"hidden_act": "gelu"}},
    ),
    processor_matters=(
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"max_pixels": 2000}),
    ),
)
if __name__ == "__main__":
    make(FIXTURE)
