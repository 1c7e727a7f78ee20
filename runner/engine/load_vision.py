"""How a text model's checkpoint sees, what that takes, and the loading of it.

Owns whether there is a tower that this package knows, and the figures of it; knows no tensor and no wire.
"""

import logging
from dataclasses import dataclass
from functools import cached_property

from models.checkpoint import Checkpoint
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.tokenizer import Tokenizer, load_tokenizer
from models.vision import PictureError, Vision, family_of, has_tower
from runner.engine.executors import Choice
from runner.engine.eye import Eye
from runner.engine.loop import Progress
from runner.engine.picture_cache import PictureCache
from runner.engine.pictures import blank_picture

IMAGE_CACHE_BYTES = 256 << 20
IMAGE_CACHE_SHARE = 16
"""Unless somebody says how much is kept of pictures: so much, or this part of what the model leaves free."""
USUAL_SIDE = 1024
"""A picture of so many pixels a side is planned for. What larger ones take is judged when they come."""

logger = logging.getLogger(__name__)


class Words:
    """A checkpoint's vocabulary, read when it is needed first. Thread: one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError."""
        return load_tokenizer(self._checkpoint)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it become those. Raises TokenizerError."""
        return self.tokenizer.encode(text, add_bos=False)


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """How a model sees, and what that takes, in bytes."""

    vision: Vision | None = None
    """None: it does not."""
    weights: int = 0
    loading: int = 0
    """What loading holds besides for a while, or a pass over a usual picture."""
    library: int = 0


def vision_of(checkpoint: Checkpoint, words: Words) -> Vision | None:
    """How the checkpoint sees; None: it does not, or nothing here knows how, which the log says. Thread: any.

    Raises:
        TokenizerError: it has no vocabulary, or one that cannot be read.
    """
    if ConfigReader(checkpoint.config).section("vision_config") is None:
        return None
    if not has_tower(info.name for info in checkpoint.infos()):
        logger.info("the files have no vision tower: images are refused")
        return None
    family = family_of(checkpoint)
    if family is None:
        named = ConfigReader(checkpoint.config).texts("architectures") or []
        logger.warning("its vision tower is unknown here: images are refused", extra={"fields": {"model": named}})
        return None
    try:
        vision = family.build(checkpoint, words.encode)
    except CheckpointError as error:
        # Of text it knows as much as ever.
        logger.warning("its vision cannot be used: images are refused", extra={"fields": {"reason": str(error)}})
        return None
    if not any(info.name.removeprefix("model.").startswith(vision.tower.prefixes) for info in checkpoint.infos()):
        logger.info("the files have no vision tower: images are refused")
        return None
    return vision


def plan_vision(checkpoint: Checkpoint, vision: Vision | None, choice: Choice) -> VisionPlan:
    """What it takes on an executor. Thread: any.

    Raises:
        CheckpointError: tensors of the tower are missing, left over or misshaped.
    """
    if vision is None:
        return VisionPlan()
    footprint = choice.tower_footprint(checkpoint, vision)
    try:
        usual = vision.tower.working_bytes(vision.prepare(blank_picture(USUAL_SIDE)).patches)
    except PictureError:
        usual = 0
    return VisionPlan(vision, footprint.weights, max(footprint.transient, usual), footprint.library)


def load_eye(
    checkpoint: Checkpoint,
    vision: Vision | None,
    choice: Choice,
    *,
    limit: int | None,
    spare: int,
    progress: Progress,
) -> Eye | None:
    """Load the tower. Thread: the executor's.

    Args:
        checkpoint: the model's.
        vision: how it sees; None: not at all.
        choice: what runs it.
        limit: bytes of pictures that are kept; None: by what there is.
        spare: bytes that the model leaves free.
        progress: is told from 0 to 1.

    Raises:
        ModelError: the tower cannot be loaded.
    """
    if vision is None:
        return None
    if limit is None:
        limit = min(IMAGE_CACHE_BYTES, max(0, spare) // IMAGE_CACHE_SHARE)
    logger.info("image cache", extra={"fields": {"limit_mib": limit >> 20}})
    return Eye(vision, choice.load_tower(checkpoint, vision, progress), PictureCache(limit))
