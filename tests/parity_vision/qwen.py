"""What the fixtures of Qwens that see have in common."""

from pathlib import Path

import numpy as np
from fixture import Arrays, token_id
from transformers import AutoTokenizer, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TOKENIZER = {
    "extra_special_tokens": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def ids() -> dict[str, int]:
    """What a config.json says of the tokens around a picture."""
    keys = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    return {key: token_id(SPECIAL, token) for key, token in keys.items()}


def older_names(weights: Arrays) -> Arrays:
    """The text model's tensors under `model.`, the tower's beside."""
    starts = {"model.language_model.": "model.", "model.visual.": "visual."}
    made: Arrays = {}
    for name, value in weights.items():
        start = next((each for each in starts if name.startswith(each)), "")
        made[starts.get(start, "") + name.removeprefix(start)] = value
    return made


def transposed(weights: Arrays) -> Arrays:
    """Experts as (inputs, outputs)."""
    return {
        name: np.ascontiguousarray(value.swapaxes(1, 2)) if ".experts." in name else value
        for name, value in weights.items()
    }


def still(kind: type[ProcessorMixin], folder: Path) -> ProcessorMixin:
    """The processor of a folder without its part for videos, which needs torchvision."""

    class Still(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, argument: object) -> None:
            """None is no processor of videos, says the reference library; nobody asks it."""

    return Still(Qwen2VLImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
