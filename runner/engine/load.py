"""From a model's name to an engine: what it will need, whether that fits, and building it.

Owns the choice between the engines, by what the checkpoint is, and the refusal of what does not fit; `load_text` and
`load_image` own the figures. Everything up to the build reads headers only.
"""

import logging

from models.checkpoint import Checkpoint, open_checkpoint
from models.embedding import read_settings
from models.image import blas, is_pipeline
from runner.config import RunnerConfig
from runner.engine.blueprint import Blueprint, DeviceMemory, LoadOptions, MemoryPlan
from runner.engine.load_embedding import plan_embedding
from runner.engine.load_text import plan_text
from runner.engine.loop import BuildEngine
from runner.engine.ranks_choice import not_shared
from runner.errors import InsufficientMemory
from runner.ranks.first import Ranks

__all__ = ["DeviceMemory", "LoadOptions", "MemoryPlan", "ModelLoader"]

logger = logging.getLogger(__name__)


class ModelLoader:
    """Plans and builds engines for this process. Thread: any; what `builder` returns runs in the executor's thread."""

    def __init__(self, config: RunnerConfig, ranks: Ranks | None = None) -> None:
        """`ranks`: who shares a model with this process."""
        self._config = config
        self._ranks = ranks

    def plan(self, reference: str, options: LoadOptions) -> MemoryPlan:
        """What loading the model would take, by its headers.

        Raises:
            ModelError: there is no such model, or this package cannot run it.
            LoadError: it cannot be loaded as this process was told to.
        """
        return self._blueprint(reference, options).memory

    def builder(self, reference: str, options: LoadOptions) -> BuildEngine:
        """Check the model's headers and the memory, and return what builds it.

        Raises:
            ModelError: there is no such model, or this package cannot run it.
            LoadError: it cannot be loaded as this process was told to.
            InsufficientMemory: it is predicted not to fit, and nobody said to try all the same.
        """
        blueprint = self._blueprint(reference, options)
        logger.info("memory plan", extra={"fields": blueprint.fields()})
        if not blueprint.memory.fits:
            message = blueprint.refusal()
            if self._config.check_memory:
                raise InsufficientMemory(message)
            logger.warning("loading all the same", extra={"fields": {"reason": message}})
        return blueprint.build

    def _blueprint(self, reference: str, options: LoadOptions) -> Blueprint:
        checkpoint = open_checkpoint(
            reference, self._config.store, options.projector, verify_digests=self._config.verify_digests
        )
        if is_pipeline(checkpoint.config):
            if self._ranks is not None:
                raise not_shared(reference)
            return self._pipeline(checkpoint)
        settings = read_settings(checkpoint, self._config.pooling)
        if settings is not None:
            if self._ranks is not None:
                raise not_shared(reference)
            return plan_embedding(checkpoint, settings, self._config, options)
        return plan_text(checkpoint, self._config, options, self._ranks)

    def _pipeline(self, checkpoint: Checkpoint) -> Blueprint:
        """Put a fast BLAS under MLX, and plan. MLX is not imported before."""
        report = blas.prepare(threads=self._config.threads)
        logger.info("BLAS prepared", extra={"fields": {"BLAS": report.summary}})
        if report.warning:
            logger.warning(report.warning)
        from runner.engine.load_image import plan_image  # noqa: PLC0415 - imports MLX

        return plan_image(checkpoint, self._config)
