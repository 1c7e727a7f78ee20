"""The language models: one module an architecture, found by looking, not by a list."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

from models.arch.base import Architecture, Model, Shapes
from models.arch.gguf import GGUFLayout
from models.config_reader import JSON, ConfigReader
from models.errors import UnsupportedArchitecture
from models.gguf_metadata import GGUFMetadata

__all__ = ["Architecture", "GGUFLayout", "Model", "Shapes", "build_model", "discover", "gguf_layout", "text_config"]

_SHARED = (
    "base",
    "blocks",
    "encoder_blocks",
    "experts",
    "gated_delta",
    "gguf",
    "kinds",
    "latent",
    "latent_gguf",
    "layer_normed",
    "recurrent",
    "sharing",
)
_TEXT_CONFIGS = ("text_config", "llm_config")
_OF_THE_WHOLE = ("architectures", "tie_word_embeddings", "dtype", "torch_dtype")


@cache
def discover() -> tuple[Architecture, ...]:
    """The ARCHITECTURE record of every module beside this one.

    Raises:
        ValueError: two modules claim one name; a mistake in this package.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]
    found = tuple(importlib.import_module(f"{__name__}.{name}").ARCHITECTURE for name in names)
    claimed = [name for architecture in found for name in architecture.hf]
    if len(set(claimed)) < len(claimed):
        raise ValueError(f"two modules of models.arch claim one architecture: {sorted(claimed)}")
    return found


def build_model(config: Mapping[str, JSON], shapes: Callable[[], Shapes] | None = None) -> Model:
    """The model that a config.json describes: of a multimodal one the text part. Thread: any.

    `shapes` gives those of the checkpoint's tensors, for what they tell besides (`models.weights.matching.model_of`).

    Raises:
        UnsupportedArchitecture: none of this package's; the message lists those there are.
        CheckpointError: a value is missing, impossible or unsupported.
    """
    wanted = ConfigReader(config).texts("architectures") or []
    for architecture in discover():
        if set(wanted) & set(architecture.hf):
            tells = architecture.told_by_tensors
            told = tells(shapes()) if tells is not None and shapes is not None else {}
            seeing = {"vision_config": config["vision_config"]} if config.get("vision_config") is not None else {}
            model = architecture.build({**told, **text_config(config), **seeing})
            if not any(config.get(key) is not None for key in _TEXT_CONFIGS) and not seeing:
                return model
            return replace(model, other_parts=(*model.other_parts, *architecture.other_parts))
    known = ", ".join(sorted(name for architecture in discover() for name in architecture.hf))
    raise UnsupportedArchitecture(f"architecture {', '.join(wanted) or 'unnamed'} is not supported; supported: {known}")


def text_config(config: Mapping[str, JSON]) -> dict[str, JSON]:
    """What a multimodal config.json says of its text model, in the words of one that is nothing else. Thread: any.

    Some have no `text_config` and say it beside the other parts'.

    Raises:
        CheckpointError: `text_config` is no object.
    """
    own = next((key for key in _TEXT_CONFIGS if config.get(key) is not None), None)
    if own is None:
        return {key: value for key, value in config.items() if key != "vision_config"}
    whole = {key: config[key] for key in _OF_THE_WHOLE if key in config}
    return whole | dict(ConfigReader(config).mapping(own)) | {"architectures": config.get("architectures")}


def gguf_layout(metadata: GGUFMetadata) -> GGUFLayout | None:
    """How the GGUF file with this metadata is written; None if no module says so. Thread: any."""
    layouts = (layout for entry in discover() for layout in entry.gguf)
    return next((each for each in layouts if metadata.arch in each.architectures and each.applies(metadata)), None)
