"""Make the fixture of Qwen2-VL: see `making.py`.

python tests/parity_vision/make_qwen2_vl.py
"""

from dataclasses import replace
from functools import partial

from make_qwen2_5_vl import CONFIG, PROCESSOR
from make_qwen2_5_vl import FIXTURE as LATER
from making import make
from qwen import TOKENIZER, still
from transformers import Qwen2VLProcessor

FIXTURE = replace(
    LATER,
    name="qwen2_vl",
    config={
        **CONFIG,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 2,
            "embed_dim": 24,
            "hidden_act": "quick_gelu",
            "hidden_size": 32,
            "in_chans": 3,
            "mlp_ratio": 2,
            "num_heads": 3,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "spatial_patch_size": 4,
            "temporal_patch_size": 2,
        },
    },
    files={"preprocessor_config.json": PROCESSOR | {"processor_class": "Qwen2VLProcessor"}},
    tokenizer=TOKENIZER | {"processor_class": "Qwen2VLProcessor"},
    processor=partial(still, Qwen2VLProcessor),
    matters=({"vision_config": {"hidden_act": "gelu"}}, {"vision_config": {"num_heads": 6}}),
    processor_matters=(),
)

if __name__ == "__main__":
    make(FIXTURE)
