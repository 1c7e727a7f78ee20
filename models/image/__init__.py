"""The image pipelines: one package a family, found by looking, not by a list."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from models.checkpoint import JSON, Checkpoint
from models.config_reader import ConfigReader
from models.errors import UnsupportedArchitecture
from models.image.base import Family, ImagePipeline, LoadChoices

__all__ = ["discover", "find_family", "is_pipeline", "load_image_pipeline"]


@cache
def discover() -> tuple[Family, ...]:
    """The FAMILY record of every package beside this module."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
    return tuple(importlib.import_module(f"{__name__}.{name}.pipeline").FAMILY for name in names)


def is_pipeline(config: Mapping[str, JSON]) -> bool:
    """Whether a checkpoint's configuration is a pipeline's model_index.json. Thread: any."""
    return _class_name(config) is not None


def find_family(config: Mapping[str, JSON]) -> Family:
    """The family that a model_index.json names. Thread: any.

    Raises:
        UnsupportedArchitecture: none of this package's; the message lists those there are.
    """
    wanted = _class_name(config)
    for family in discover():
        if wanted in family.class_names:
            return family
    known = ", ".join(sorted(name for family in discover() for name in family.class_names))
    raise UnsupportedArchitecture(f"image pipeline {wanted or 'unnamed'} is not supported; supported: {known}")


def load_image_pipeline(checkpoint: Checkpoint, choices: LoadChoices) -> ImagePipeline:
    """Build a pipeline and load its weights.

    Raises:
        ModelError: the checkpoint cannot be used.

    Thread: the MLX thread; the pipeline belongs to it.
    """
    return find_family(checkpoint.config).load(checkpoint, choices)


def _class_name(config: Mapping[str, JSON]) -> str | None:
    reader = ConfigReader(config)
    name = reader.text("_class_name", "") or reader.text("architecture", "")
    return name or None
