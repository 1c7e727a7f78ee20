"""Idefics3 and SmolVLM, the text part: a Llama whose tensors go by names of their own.

Source: transformers v5.24 `modeling_idefics3` and `modeling_smolvlm`.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import blocks, llama
from models.arch.base import Architecture, Model, Stack
from models.arch.llava import LLAMA
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError

_NAMES = Stack(r"(?:model\.)?text_model\.(?:model\.)?(.*)", ("model.{0}",), whole=True)
"""What is `model.` in a Llama is `model.text_model.` here."""


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    if (kind := ConfigReader(config).text("model_type", "llama")) != "llama":
        raise CheckpointError(f"a text model of type {kind!r} is not supported", file=blocks.FILE)
    model = llama.build(blocks.completed(config, LLAMA))
    return replace(model, stacks=(*model.stacks, _NAMES))


ARCHITECTURE = Architecture(
    hf=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    gguf=(),
    build=build,
    other_parts=("vision_model.", "connector."),
    without_gguf="llama.cpp writes its text part as the Llama that it is",
)
