"""Which tensors are quantised, and to what.

Source: ollama v0.34.4 create/create.go and create/quantpolicy.go for language models; v0.24.0 x/create/create.go and
x/create/imagegen.go for image pipelines.
"""

import math
import re
from collections.abc import Sequence

from models.errors import QuantizationError
from models.quantization import spec_of_quant_type

QUANT_TYPES = ("int4", "int8", "nvfp4", "mxfp4", "mxfp8")

_FEWEST_ELEMENTS = 1024
_EIGHT_BIT = {"int4": "int8", "int8": "int8", "nvfp4": "mxfp8", "mxfp4": "mxfp8", "mxfp8": "mxfp8"}
_EXPERTS = (".experts.", ".mlp.switch_mlp.", ".mlp.shared_experts.")
_ROUTERS = (".mlp.gate.weight", ".shared_expert_gate.weight", ".router.proj.weight")
_SENSITIVE = (".v_proj", ".k_proj", "down_proj")
_NEVER = ("audio_tower", "embed_audio", "embed", "norm", "ln_", "layernorm")
# Ollama quantises these by rules of their own.
_OTHER_RULES = re.compile(r"qwen3_?5|qwen3next|qwen4|gemma4|laguna|cohere2_?moe|glimmer|nemotron_?h", re.IGNORECASE)


def check_architectures(names: Sequence[str]) -> None:
    """Refuse to quantise what Ollama would quantise by rules that are not here.

    Raises:
        QuantizationError: one of the names is such an architecture's.
    """
    for name in names:
        if _OTHER_RULES.search(name):
            raise QuantizationError(
                f"{name} is quantised by rules of its own, which only Ollama has: create it without --quantize, or "
                "with `ollama create --experimental --quantize`"
            )


def language_quant_type(name: str, shape: tuple[int, ...], requested: str) -> str | None:
    """The quantisation of a language model's tensor; None keeps it as it is.

    Attention's keys and values and the way out of the feed-forward layer get eight bits where four are asked for, so
    does the head; embeddings, norms, biases and routers stay.
    """
    stacked = _is_expert(name)
    if not (stacked or _is_linear(name)) or not (len(shape) == 2 or (len(shape) == 3 and stacked)):
        return None
    if math.prod(shape) < _FEWEST_ELEMENTS or name.endswith(_ROUTERS):
        return None
    eight = _EIGHT_BIT[requested]
    if name.endswith("lm_head.weight"):
        return eight if _is_aligned(shape, eight) else None
    if not _is_aligned(shape, requested):
        return None
    # The four-bit floating kinds have one kernel for all experts, which takes one kind.
    promotes = requested == "int4" or (requested in {"nvfp4", "mxfp4"} and not stacked)
    if promotes and any(part in name for part in _SENSITIVE) and _is_aligned(shape, eight):
        return eight
    return requested


def pipeline_quant_type(component: str, name: str, shape: tuple[int, ...], requested: str) -> str | None:
    """The quantisation of a tensor of an image pipeline's component; None keeps it as it is."""
    if component == "vae" or not _is_linear(name) or len(shape) < 2:
        return None
    return requested if _is_aligned(shape, requested) else None


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and not any(part in name for part in _NEVER)


def _is_expert(name: str) -> bool:
    return any(part in name for part in _EXPERTS) and not name.endswith((".bias", ".scale", ".qbias"))


def _is_aligned(shape: tuple[int, ...], quant_type: str) -> bool:
    return shape[-1] % spec_of_quant_type(quant_type, None).group_size == 0
