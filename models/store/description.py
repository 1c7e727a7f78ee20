"""Ollama's own description of a model: what `ollama show` shows, and how a chat becomes a prompt and an answer again.

A renderer and a parser are names of Go code in Ollama. A model without one is described by a template layer.

Source: ollama v0.34.4 types/model/config.go, types/model/generation.go, create/metadata.go; it describes Qwen3-VL as it
does Qwen3, whose renderer passes over pictures, so that family's own names are taken from model/renderers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.sources.base import JSON

# The first Ollama that reads safetensors models.
REQUIRES = "0.19.0"

# Option: its kind, and the keys of generation_config.json that say it.
_GENERATION_DEFAULTS: Mapping[str, tuple[Callable[[float], JSON], tuple[str, ...]]] = {
    "frequency_penalty": (float, ("frequency_penalty",)),
    "min_p": (float, ("min_p",)),
    "presence_penalty": (float, ("presence_penalty",)),
    "repeat_last_n": (int, ("repeat_last_n", "penalty_last_n")),
    "repeat_penalty": (float, ("repetition_penalty", "repeat_penalty", "penalty_repeat")),
    "temperature": (float, ("temperature",)),
    "top_k": (int, ("top_k",)),
    "top_p": (float, ("top_p",)),
}

# What an architecture's or model type's name contains, the renderer and the parser; the first match is taken.
_RENDERED = (
    ("museglimmer", "glimmer", "glimmer"),
    ("muse_glimmer", "glimmer", "glimmer"),
    ("laguna", "laguna", "laguna"),
    ("cohere2moe", "cohere", "cohere"),
    ("cohere2_moe", "cohere", "cohere"),
    ("gemma4", "gemma4", "gemma4"),
    ("glm4", "glm-4.7", "glm-4.7"),
    ("glm-4", "glm-4.7", "glm-4.7"),
    ("deepseek", "deepseek3", "deepseek3"),
    ("qwen4exp", "qwen3.8", "qwen3.5"),
    ("qwen4_exp", "qwen3.8", "qwen3.5"),
    ("qwen3_5", "qwen3.5", "qwen3.5"),
    ("qwen3next", "qwen3.5", "qwen3.5"),
    ("qwen3vl", "qwen3-vl-instruct", "qwen3-vl-instruct"),
    ("qwen3_vl", "qwen3-vl-instruct", "qwen3-vl-instruct"),
    ("qwen3", "qwen3-coder", "qwen3"),
    ("nemotronh", "nemotron-3-nano", "nemotron-3-nano"),
    ("nemotron_h", "nemotron-3-nano", "nemotron-3-nano"),
    # Ollama parses this family's answers and renders no prompts: they come from a template.
    ("gptoss", "", "harmony"),
    ("gpt_oss", "", "harmony"),
)
_ALWAYS_THINKING = ("qwen3_5", "qwen3next", "qwen4exp", "qwen4_exp")
# All other parsers know both.
_PARSERS_WITHOUT_THINKING = ("qwen3", "qwen3-vl-instruct")


@dataclass(frozen=True, slots=True)
class Rendering:
    """The names of Ollama's renderer and parser; both are empty if it has none for the model."""

    renderer: str
    parser: str


def rendering_of(config: Mapping[str, JSON], chat_template: str) -> Rendering:
    """Who renders and parses the model's chats."""
    for identifier in identifiers(config):
        lowered = identifier.lower()
        for part, renderer, parser in _RENDERED:
            if part in lowered:
                return _refined(Rendering(renderer, parser), chat_template)
    return Rendering("", "")


def _refined(found: Rendering, chat_template: str) -> Rendering:
    """Generations of a family that only their template tells apart."""
    match found.renderer:
        case "qwen3.5" if "resolved_reasoning_effort" in chat_template and "preserve_thinking" in chat_template:
            return Rendering("qwen3.8", found.parser)
        case "laguna" if "laguna_glm_thinking_v8" in chat_template:
            return Rendering("poolside-v1", "poolside-v1")
        case "nemotron-3-nano" if "{reasoning effort: efficient}" in chat_template:
            return Rendering("nemotron-3.5-nano", "nemotron-3.5-nano")
        case "qwen3-vl-instruct" if "<think>" in chat_template:
            return Rendering("qwen3-vl-thinking", "qwen3-vl-thinking")
    return found


def identifiers(config: Mapping[str, JSON]) -> list[str]:
    """What the model calls its architecture and type, the nearest first."""
    named = config.get("architectures")
    nested = config.get("llm_config")
    candidates = [
        *(named if isinstance(named, list) else []),
        config.get("model_type"),
        nested.get("model_type") if isinstance(nested, dict) else None,
    ]
    return [each for each in candidates if isinstance(each, str)]


def capabilities_of(
    config: Mapping[str, JSON], chat_template: str, rendering: Rendering, *, sees: bool = False
) -> list[JSON]:
    """What the parent may use a language model for.

    Pictures if this program can look at them (`sees`). Not sounds, whatever the model could: this program refuses them,
    and says so later than a parent that knows.
    """
    found: list[JSON] = ["completion"]
    if sees:
        found.append("vision")
    if rendering.parser:
        found.append("tools")
    thinks = any(part in name.lower() for name in identifiers(config) for part in _ALWAYS_THINKING)
    parses_thinking = rendering.parser not in {"", *_PARSERS_WITHOUT_THINKING}
    if thinks or parses_thinking or _template_thinks(chat_template):
        found.append("thinking")
    return found


def _template_thinks(chat_template: str) -> bool:
    if "<think>" in chat_template and "</think>" in chat_template:
        return True
    strips = "content.split('</think>')" in chat_template or 'content.split("</think>")' in chat_template
    return strips and "reasoning_content" not in chat_template and "<SPECIAL_12>" not in chat_template


def generation_defaults(generation_config: Mapping[str, JSON]) -> dict[str, JSON]:
    """The sampling that the model's authors chose, in Ollama's names. A null says nothing."""
    found: dict[str, JSON] = {}
    for option, (kind, keys) in _GENERATION_DEFAULTS.items():
        values = (generation_config.get(key) for key in keys)
        number = next((each for each in values if isinstance(each, int | float) and not isinstance(each, bool)), None)
        if number is not None:
            found[option] = kind(number)
    return found


def description(
    *,
    model_format: str,
    family: str = "",
    parameter_size: str = "",
    file_type: str = "",
    defaults: Mapping[str, JSON] | None = None,
    rendering: Rendering = Rendering("", ""),
    requires: str = "",
    capabilities: list[JSON] | None = None,
) -> dict[str, JSON]:
    """The config blob, its fields in Ollama's order; Ollama leaves the family of a safetensors model to config.json."""
    families: list[JSON] = [family]
    fields: dict[str, JSON] = {
        "model_format": model_format,
        "model_family": family,
        "model_families": families if family else None,
        "model_type": parameter_size,
        "file_type": file_type,
    }
    optional: dict[str, JSON] = {
        "generation_defaults": dict(defaults or {}),
        "renderer": rendering.renderer,
        "parser": rendering.parser,
        "requires": requires,
        "capabilities": capabilities or [],
    }
    return fields | {key: value for key, value in optional.items() if value}
