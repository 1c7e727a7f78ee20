"""Make the fixture of Muse Glimmer: see `making.py`.

Its processor has no form on Pillow, so it is given one here; it wants torchvision besides.

    python tests/parity_vision/make_muse_glimmer.py
"""

from pathlib import Path

import pillow
import torch
from fixture import Fixture, token_id, vocabulary
from making import make
from transformers import AutoTokenizer, AutoVideoProcessor, MuseGlimmerImageProcessor, MuseGlimmerProcessor
from transformers.models.muse_glimmer.image_processing_muse_glimmer import smart_resize

SPECIAL = (
    "<|image_start|>",
    "<|patch|>",
    "<|image_end|>",
    "<|video|>",
    "<|vid_start|>",
    "<|vid_end|>",
    "<|vid_frame_separator|>",
)


class OnPillow(MuseGlimmerImageProcessor):
    """Resizes with Pillow, as the processors of all other models can."""

    def resize(self, images, patch_size, merge_size, max_tokens, resample, **kwargs):
        height, width = smart_resize(*images.shape[-2:], patch_size * merge_size, max_tokens)
        return torch.stack([pillow.resized(image, height, width, resample) for image in images])


def processor(folder: Path) -> MuseGlimmerProcessor:
    return MuseGlimmerProcessor(
        image_processor=OnPillow.from_pretrained(folder),
        video_processor=AutoVideoProcessor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


IMAGES = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_processor_type": "MuseGlimmerImageProcessor",
    "image_std": [0.3, 0.45, 0.5],
    "max_image_tokens": 26,
    "merge_size": 2,
    "patch_size": 3,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
}
# A window is a square of positions: pictures are several, with odd ones at their edges.
MUSE_GLIMMER = Fixture(
    name="muse_glimmer_vl",
    config={
        "architectures": ["MuseGlimmerForConditionalGeneration"],
        "model_type": "muse_glimmer",
        "image_token_id": token_id(SPECIAL, "<|patch|>"),
        "video_token_id": token_id(SPECIAL, "<|video|>"),
        "out_hidden_size": 96,
        "projector_hidden_act": "gelu_pytorch_tanh",
        "projector_hidden_size": 20,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "muse_glimmer_text",
            "vocab_size": vocabulary(SPECIAL),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "post_norm_eps": 1e-8,
            "sliding_window": 20,
            "qk_scale_factor": 2.5,
            "output_multiplier": 1.6,
            "final_logit_softcapping": 15.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "muse_glimmer_vision",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": 3,
            "num_hidden_layers": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 0.02,
            "layer_types": ["window_attention", "full_attention", "window_attention"],
            "merge_size": 2,
            "patch_size": 3,
            "patch_temporal": 2,
            "pos_emb_height": 5,
            "pos_emb_width": 5,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 40.0},
        },
    },
    files={
        "preprocessor_config.json": IMAGES,
        "processor_config.json": {"processor_class": "MuseGlimmerProcessor"},
        "video_preprocessor_config.json": {
            "merge_size": 2,
            "patch_size": 3,
            "temporal_patch_size": 2,
            "video_processor_type": "MuseGlimmerVideoProcessor",
        },
    },
    special=SPECIAL,
    placeholder="<|patch|>",
    tokenizer={"processor_class": "MuseGlimmerProcessor"},
    bos=True,
    less_one=r"language_model.*layernorm\.weight",
    processor=processor,
    matters=(
        {"vision_config": {"layer_norm_eps": 1e-5}},
        {"vision_config": {"rope_parameters": {"rope_theta": 10000.0}}},
        {"vision_config": {"layer_types": ["window_attention"] * 3}},
        {"vision_config": {"hidden_act": "silu"}},
        {"projector_hidden_act": "silu"},
    ),
    processor_matters=(
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"resample": 3}),
        ("preprocessor_config.json", {"max_image_tokens": 40}),
    ),
)

if __name__ == "__main__":
    make(MUSE_GLIMMER)
