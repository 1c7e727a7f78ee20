"""The text part of both LLaVAs and of Pixtral as transformers has it: a Llama, a Mistral or a Qwen2, by `model_type`.

Source: transformers v5.24 `modeling_llava`, and the defaults of the three models' configurations: what a published
text_config does not say is one of these.
"""

from collections.abc import Mapping

from models.arch import blocks, llama, qwen2
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError

LLAMA: Mapping[str, JSON] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_MISTRAL: Mapping[str, JSON] = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2: Mapping[str, JSON] = {
    **LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    match kind := ConfigReader(config).text("model_type", "llama"):
        case "llama":
            return llama.build({**blocks.completed(config, LLAMA), "architectures": ["LlamaForCausalLM"]})
        case "mistral":
            completed = blocks.completed(config, _MISTRAL, nullable=("sliding_window",))
            return llama.build({**completed, "architectures": ["MistralForCausalLM"]})
        case "qwen2":
            return qwen2.build(blocks.completed(config, _QWEN2))
        case _:
            raise CheckpointError(f"a text model of type {kind!r} is not supported", file=blocks.FILE)


ARCHITECTURE = Architecture(
    hf=("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"),
    gguf=(),
    build=build,
    other_parts=("vision_tower.", "multi_modal_projector.", "image_newline"),
    without_gguf="llama.cpp writes its text part as the model that it is",
)
