"""The language models: one module an architecture, found by looking, not by a list."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import cast

import mlx.core as mx
from mlx import nn

from models.backend import device
from models.cache import CacheType
from models.checkpoint import JSON, Checkpoint
from models.config_reader import ConfigReader
from models.errors import UnsupportedArchitecture
from models.llm.base import Architecture, LanguageModel, Row
from models.nn.decoder import Decoder
from models.nn.fused import fused
from models.quantization import WeightPolicy
from models.weights import load_weights, stored_dtype

__all__ = [
    "Architecture",
    "LanguageModel",
    "Row",
    "discover",
    "find_architecture",
    "load_language_model",
]


@cache
def discover() -> tuple[Architecture, ...]:
    """The ARCHITECTURE record of every module beside this one.

    Raises:
        ValueError: two modules claim one name; a mistake in this package.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]
    found = tuple(importlib.import_module(f"{__name__}.{name}").ARCHITECTURE for name in names)
    claimed = [name for architecture in found for name in architecture.hf]
    if len(set(claimed)) < len(claimed):
        raise ValueError(f"two modules of models.llm claim one architecture: {sorted(claimed)}")
    return found


def find_architecture(config: Mapping[str, JSON]) -> Architecture:
    """The architecture that a config.json names. Thread: any.

    Raises:
        UnsupportedArchitecture: none of this package's; the message lists those there are.
    """
    wanted = ConfigReader(config).texts("architectures") or []
    for architecture in discover():
        if set(wanted) & set(architecture.hf):
            return architecture
    known = ", ".join(sorted(name for architecture in discover() for name in architecture.hf))
    raise UnsupportedArchitecture(f"architecture {', '.join(wanted) or 'unnamed'} is not supported; supported: {known}")


def load_language_model(
    checkpoint: Checkpoint,
    *,
    policy: WeightPolicy = "auto",
    cache_type: CacheType = "f16",
    progress: Callable[[float], None] = lambda _: None,
    fuse: bool | None = None,
) -> LanguageModel:
    """Build the model, load its weights, and bring it into the form that is fast on this device.

    Args:
        checkpoint: where the weights are.
        policy: what becomes of quantised weights.
        cache_type: how keys and values are held.
        progress: told 0 to 1 as weights arrive; may raise to abandon the load.
        fuse: whether to use the CPU's fused form; None decides by the device and the weights.

    Raises:
        ModelError: the checkpoint cannot be used.

    Thread: the MLX thread; the model belongs to it.
    """
    architecture = find_architecture(checkpoint.config)
    model = architecture.model(architecture.config(checkpoint.config).with_cache(cache_type))
    on_cpu = device().kind == "cpu"
    load_weights(
        cast("nn.Module", model),
        checkpoint,
        policy=policy,
        dense_dtype=mx.float32 if on_cpu else stored_dtype(checkpoint.config),
        progress=progress,
    )
    return fused(model) if isinstance(model, Decoder) and (on_cpu if fuse is None else fuse) else model
