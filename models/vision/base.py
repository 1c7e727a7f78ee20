"""What a family of vision-language models declares: how a picture becomes patches, and patches rows for the decoder.

A family's module ends in `FAMILY = Family(...)` and is found by looking. What is done to a picture on the host
(`Vision.prepare`) needs numpy and Pillow alone and follows the checkpoint's own processor files; what is done to its
patches (`Tower.forward`) is written once in `TowerOps` and runs on every executor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from models.arch.base import Stack
from models.config_reader import JSON
from models.ops.vision import TowerOps
from models.vision.gguf import ProjectorLayout

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""An RGB picture, uint8 (H, W, 3)."""
Given: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""The arrays of one pass by the names that the tower asks for."""

PLACE = -1
"""In a picture's expansion, where a row of the tower stands; everything else is a token."""


class PictureError(Exception):
    """A picture that the model cannot look at: the request's fault, said to whoever sent it."""


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower with the projector behind it: an encoder without state."""

    weights: Any
    """A dataclass of declarations."""
    forward: Callable[[TowerOps[Any]], Sequence[Any]]
    """The rows (N, width) that stand in place of the embeddings as the decoder's table has them (so divided by what the
    decoder multiplies these by), and behind them those that are added deeper, one for each of the first layers."""
    width: int
    """The decoder's."""
    num_layers: int
    prefixes: tuple[str, ...]
    """What the names of its tensors begin with, without a leading `model.`."""
    working_bytes: Callable[[int], int]
    """What a pass over so many patches takes besides weights."""
    deep: int = 0
    """How many layers of the decoder have something added behind them."""
    stacks: tuple[Stack, ...] = ()
    other_parts: tuple[str, ...] = ()
    """Beginnings of names, without a leading `model.`, of what nobody asks for: layers behind the last that counts."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture made ready on the host."""

    passes: tuple[Given, ...]
    """What the tower is given, a pass for each part that is looked at by itself; their rows follow one another."""
    patches: int
    """Of the longest pass."""
    expansion: tuple[int, ...]
    """All tokens that stand for the picture in a prompt, those around it included; PLACE for each row of the tower."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the places, where positions have axes: they all have the first one's time, and what follows
    goes on behind the longer side. The places are consecutive then."""

    @property
    def nbytes(self) -> int:
        """What it holds."""
        return sum(array.nbytes for given in self.passes for array in given.values())


@dataclass(frozen=True, slots=True)
class Vision:
    """How one model sees."""

    tower: Tower
    prepare: Callable[[Pixels], Prepared]
    """Thread: any, several at once. Raises PictureError."""
    filler: int
    """The token in a picture's places for whatever else looks tokens up."""
    longest_run: int | None = None
    """Places of a picture look at each other both ways, at most so many in a row; None: they look back alone."""


class Files(Protocol):
    """What a family reads of a checkpoint: see `models.checkpoint.Checkpoint`."""

    @property
    def config(self) -> Mapping[str, JSON]:
        """The model's `config.json`."""
        ...

    def read(self, name: str) -> bytes | None:
        """A configuration file (`preprocessor_config.json`), or None if there is none."""
        ...


Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Token ids of a text; special tokens written out in it become those tokens."""


@dataclass(frozen=True, slots=True)
class Family:
    """An entry: the architectures of config.json it is for, and how it is built."""

    hf: tuple[str, ...]
    build: Callable[[Files, Encode], Vision]
    """Raises CheckpointError for missing, impossible or unsupported values."""
    gguf: tuple[ProjectorLayout, ...] = ()
    """How GGUF files hold its towers; the first that applies to a file counts."""
