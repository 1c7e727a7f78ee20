"""The language models: one module an architecture, found by looking, not by a list."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from models.arch.base import Architecture, GGUFNames, Model
from models.config_reader import JSON, ConfigReader
from models.errors import UnsupportedArchitecture

__all__ = ["Architecture", "GGUFNames", "Model", "build_model", "discover", "gguf_names"]

_SHARED = ("base", "blocks", "encoder_blocks")


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


def build_model(config: Mapping[str, JSON]) -> Model:
    """The model that a config.json describes. Thread: any.

    Raises:
        UnsupportedArchitecture: none of this package's; the message lists those there are.
        CheckpointError: a value is missing, impossible or unsupported.
    """
    wanted = ConfigReader(config).texts("architectures") or []
    for architecture in discover():
        if set(wanted) & set(architecture.hf):
            return architecture.build(config)
    known = ", ".join(sorted(name for architecture in discover() for name in architecture.hf))
    raise UnsupportedArchitecture(f"architecture {', '.join(wanted) or 'unnamed'} is not supported; supported: {known}")


def gguf_names(architecture: str) -> GGUFNames | None:
    """How GGUF files of that `general.architecture` name things; None if no module says so. Thread: any."""
    records = (names for entry in discover() for names in entry.gguf)
    return next((names for names in records if architecture in names.architectures), None)
