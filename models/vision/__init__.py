"""The vision of language models: one module a family, found by looking, not by a list. Towers stand beside them."""

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache

from models.config_reader import ConfigReader
from models.gguf_metadata import GGUFMetadata
from models.vision.base import (
    PLACE,
    Encode,
    Family,
    Files,
    Given,
    PictureError,
    Pixels,
    Prepared,
    Tower,
    Vision,
)
from models.vision.gguf import ProjectorLayout, layout_in

__all__ = [
    "PLACE",
    "Encode",
    "Family",
    "Files",
    "Given",
    "PictureError",
    "Pixels",
    "Prepared",
    "ProjectorLayout",
    "Tower",
    "Vision",
    "discover",
    "family_of",
    "has_tower",
    "projector_layout",
]


@cache
def discover() -> tuple[Family, ...]:
    """The FAMILY of every module beside this one that has one.

    Raises:
        ValueError: two modules claim one name; a mistake in this package.
    """
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))
    claimed = [name for family in found for name in family.hf]
    if len(set(claimed)) < len(claimed):
        raise ValueError(f"two modules of models.vision claim one architecture: {sorted(claimed)}")
    return found


def projector_layout(metadata: GGUFMetadata, text: str = "") -> ProjectorLayout | None:
    """How a projector file, or a file that has text model and tower, holds its tower; None: no module says so.

    `text` is the `general.architecture` of the text model that a projector file is to go with.
    """
    return layout_in(tuple(layout for family in discover() for layout in family.gguf), metadata, text)


def family_of(files: Files) -> Family | None:
    """The family of a checkpoint that has a vision tower; None: it sees nothing, or nothing here knows how."""
    reader = ConfigReader(files.config)
    if reader.section("vision_config") is None:
        return None
    wanted = set(reader.texts("architectures") or [])
    return next((family for family in discover() if wanted & set(family.hf)), None)


def has_tower(names: Iterable[str]) -> bool:
    """Whether tensors of these names have a vision tower among them; text alone is often published with its config."""
    return any("vision" in name or "visual" in name for name in names)
