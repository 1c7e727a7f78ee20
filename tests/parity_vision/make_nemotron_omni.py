"""Make the fixtures of Nemotron 3 Nano Omni: see `making.py`.

Its processor has no form on Pillow, so it is given one here; it wants torchvision besides.

    python tests/parity_vision/make_nemotron_omni.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fixture import Arrays, Fixture, merged, token_id, vocabulary
from making import make
from PIL import Image
from transformers import (
    AutoTokenizer,
    AutoVideoProcessor,
    NemotronH_Omni_Reasoning_V3ImageProcessor,
    NemotronH_Omni_Reasoning_V3Processor,
    ParakeetFeatureExtractor,
)

SPECIAL = ("<image>", "<img>", "</img>", "<video>", "<so_embedding>")
IDLE = r"video|summary_idxs|input_conditioner|lambda1"


class OnPillow(NemotronH_Omni_Reasoning_V3ImageProcessor):
    """Resizes with Pillow, as the processors of all other models can, in float32 as it does itself."""

    def resize(self, image, size, resample, **kwargs):
        made = []
        for picture in image:
            channels = [Image.fromarray(channel.numpy()).resize((size.width, size.height), 3) for channel in picture]
            made.append(torch.from_numpy(np.stack([np.array(channel) for channel in channels])))
        return torch.stack(made)


def processor(folder: Path) -> NemotronH_Omni_Reasoning_V3Processor:
    return NemotronH_Omni_Reasoning_V3Processor(
        image_processor=OnPillow.from_pretrained(folder),
        video_processor=AutoVideoProcessor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        feature_extractor=ParakeetFeatureExtractor(),
    )


def published(stored: Arrays) -> Arrays:
    """Without what does nothing."""
    return {name: value for name, value in stored.items() if not name.endswith("lambda1")}


OMNI = Fixture(
    name="nemotron_omni",
    config={
        "architectures": ["NemotronH_Omni_Reasoning_V3"],
        "model_type": "nemotron_h_omni",
        "audio_config": None,
        "downsample_ratio": 0.5,
        "img_context_token_id": token_id(SPECIAL, "<image>"),
        "video_context_token_id": token_id(SPECIAL, "<video>"),
        "sound_context_token_id": token_id(SPECIAL, "<so_embedding>"),
        "projector_hidden_size": 40,
        "torch_dtype": "float32",
        "vit_hidden_size": 24,
        "llm_config": {
            "model_type": "nemotron_h",
            "vocab_size": vocabulary(SPECIAL),
            "hidden_size": 32,
            "intermediate_size": 48,
            "hybrid_override_pattern": "M*-",
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 6,
            "conv_kernel": 4,
            "chunk_size": 16,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "use_mamba_kernels": False,
        },
        "vision_config": {
            "model_type": "radio",
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "mlp_ratio": 1.5,
            "layer_norm_eps": 0.02,
            "max_img_size": 20,
            "num_cls_tokens": 2,
            "num_registers": 3,
            "patch_size": 4,
            "summary_idxs": [0],
            "video_temporal_patch_size": 2,
        },
    },
    files={
        "preprocessor_config.json": {
            "downsample_ratio": 0.5,
            "image_processor_type": "NemotronH_Omni_Reasoning_V3ImageProcessor",
            "max_model_len": 512,
            "max_num_patches": 104,
            "min_num_patches": 30,
            "norm_mean": [0.4, 0.5, 0.6],
            "norm_std": [0.3, 0.45, 0.5],
            "patch_size": 4,
        },
        "processor_config.json": {"processor_class": "NemotronH_Omni_Reasoning_V3Processor"},
        "video_preprocessor_config.json": {
            "downsample_ratio": 0.5,
            "patch_size": 4,
            "video_processor_type": "NemotronH_Omni_Reasoning_V3VideoProcessor",
        },
    },
    special=SPECIAL,
    placeholder="<image>",
    tokenizer={"processor_class": "NemotronH_Omni_Reasoning_V3Processor"},
    idle=IDLE,
    processor=processor,
    published=published,
    matters=({"vision_config": {"layer_norm_eps": 1e-6}}, {"vision_config": {"hidden_act": "silu"}}),
    processor_matters=(
        ("preprocessor_config.json", {"norm_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"norm_std": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"max_num_patches": 60}),
    ),
)
# Where the language model has layers that predict further tokens, the tower has a norm more behind it.
NORMED = replace(
    OMNI,
    name="nemotron_omni_normed",
    config=merged(
        OMNI.config,
        {"architectures": ["NemotronH_Nano_Omni_Reasoning_V3"], "llm_config": {"num_nextn_predict_layers": 1}},
    ),
)

if __name__ == "__main__":
    for fixture in (OMNI, NORMED):
        make(fixture)
