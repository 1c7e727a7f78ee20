"""What the GGUF files of the Qwens that see have in common.

Source: llama.cpp `conversion/qwenvl.py`, Qwen2VLVisionModel, and `tools/mtmd/clip.cpp`, `load_hparams`, whose GELU is
the one by a hyperbolic tangent.
"""

from collections.abc import Mapping

from models.config_reader import JSON
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.vision.gguf import Config, Made, Tokens, pixel_rules
from models.vision.processing import CLIP_MEAN, CLIP_STD

BLOCK = "visual.blocks.{n}."
QKV = tuple(
    Made(f"{BLOCK}attn.qkv.{kind}", tuple(f"v.blk.{{n}}.attn_{part}.{kind}" for part in "qkv"))
    for kind in ("weight", "bias")
)
FRAMES = 2
"""Of a patch: a convolution for each."""


def frames(*pieces: str) -> Made:
    """The patch embedding from a convolution a frame."""
    return Made("visual.patch_embed.proj.weight", pieces, axis=2, stacked=True)


PATCHES = frames("v.patch_embd.weight", "v.patch_embd.weight.1")
"""As llama.cpp has them."""


def token_ids(tokens: Tokens) -> Config:
    """What config.json says of the tokens of a picture."""
    return {
        "vision_start_token_id": tokens("<|vision_start|>"),
        "vision_end_token_id": tokens("<|vision_end|>"),
        "image_token_id": tokens("<|image_pad|>"),
        "video_token_id": tokens("<|video_pad|>"),
    }


def merge_of(metadata: GGUFMetadata) -> int:
    """Patches along the side of a window."""
    return metadata.integer("vision.spatial_merge_size") or 2


def frames_of(metadata: GGUFMetadata) -> int:
    """How often a patch holds a picture."""
    return metadata.integer("vision.temporal_patch_size") or FRAMES


def shape_of(metadata: GGUFMetadata, name: str) -> tuple[int, int]:
    """The shape of a matrix. Raises CheckpointError: there is none of that name."""
    shape = metadata.shapes.get(name, ())
    if len(shape) != 2:
        raise CheckpointError("is missing or no matrix", file=metadata.file, tensor=name)
    return shape[0], shape[1]


def activation_of(metadata: GGUFMetadata) -> str:
    """Hugging Face's name of what is between the matrices of an MLP. Raises CheckpointError: a file says two."""
    gelu, silu = metadata.flag("use_gelu"), metadata.flag("use_silu")
    if gelu and silu:
        raise CheckpointError(
            "its metadata has clip.use_gelu and clip.use_silu, and only one can be", file=metadata.file
        )
    return "gelu_pytorch_tanh" if gelu else "silu" if silu else "quick_gelu"


def files_of(metadata: GGUFMetadata, *, mean: list[JSON], std: list[JSON], size: Config) -> Mapping[str, Config]:
    """The processor's files; mean, deviation and size are where a file does not say."""
    told: Config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "merge_size": merge_of(metadata),
        "patch_size": metadata.count("vision.patch_size"),
        "temporal_patch_size": frames_of(metadata),
    }
    return {"preprocessor_config.json": pixel_rules(metadata, resample=3, mean=mean, std=std) | told | size}


def older_files(metadata: GGUFMetadata) -> Mapping[str, Config]:
    """Those of Qwen2-VL and Qwen2.5-VL."""
    size: Config = {
        "max_pixels": metadata.integer("vision.image_max_pixels") or 12845056,
        "min_pixels": metadata.integer("vision.image_min_pixels") or 3136,
    }
    return files_of(metadata, mean=list(CLIP_MEAN), std=list(CLIP_STD), size=size)
