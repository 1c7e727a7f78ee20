"""Qwen3.5's tower: Qwen3-VL's, with rows from its end alone.

Source: transformers v5.24 `modeling_qwen3_5`.
"""

from models.arch.encoder_blocks import FILE
from models.errors import CheckpointError
from models.vision import qwen3_vl, qwen3_vl_gguf, qwen_tower
from models.vision.base import Encode, Family, Files, Vision


def build(files: Files, encode: Encode) -> Vision:
    """See `Family.build`."""
    if exits := qwen_tower.vision_of(files).integers("deepstack_visual_indexes"):
        raise CheckpointError(f"deepstack_visual_indexes {exits} is not supported: the decoder takes none", file=FILE)
    return qwen3_vl.build(files, encode)


FAMILY = Family(
    hf=("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
    build=build,
    gguf=qwen3_vl_gguf.QWEN3_5,
)
