"""A GGUF text model with its vision tower, from a projector file or from the same file, as one checkpoint.

Which projector goes with a model: the one that somebody names; else the tower in its own file; else, of a file that
somebody names by its path, the only `*mmproj*.gguf` beside it, if it fits. Source: llama.cpp `common/arg.cpp` and
`common/download.cpp` for the projector beside a model; Ollama v0.24.0 for the one file.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from models.errors import CheckpointError
from models.sources.base import JSON, Checkpoint, NamedTensor, TensorInfo
from models.sources.gguf import GGUFFile
from models.sources.gguf_projector import Projector
from models.vision import projector_layout
from models.vision.gguf import PROJECTOR, has_tower, projector_type

_log = logging.getLogger(__name__)
_MARK = "mmproj"


class SeeingGGUF:
    """A text model and a tower (see `Checkpoint`)."""

    def __init__(self, text: GGUFFile, projector: Projector, projector_path: Path | None) -> None:
        self._text = text
        self._projector = projector
        self.projector_path = projector_path
        """None: the tower is in the text model's file."""
        self.reference = text.reference

    @cached_property
    def config(self) -> Mapping[str, JSON]:
        """See `Checkpoint.config`. The text model's is the `text_config`."""
        return self._projector.config(self._text.config, self._text.token_id)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as stored."""
        return self._text.nbytes + (self._projector.nbytes if self.projector_path else 0)

    def read(self, name: str) -> bytes | None:
        """See `GGUFFile.read`."""
        if name == "config.json":
            return json.dumps(self.config).encode()
        return self._projector.files.get(name) or self._text.read(name)

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        """See `Checkpoint.infos`."""
        yield from self._text.infos(component)
        if not component:
            yield from self._projector.infos()

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """See `Checkpoint.tensors`."""
        yield from self._text.tensors(component)
        if not component:
            yield from self._projector.tensors()


def open_gguf(path: Path, reference: str, projector: Path | None = None, *, beside: bool = False) -> Checkpoint:
    """Open a GGUF file, with its tower if there is one that this package knows; the log names one that it does not.

    Args:
        path: the text model.
        reference: what messages call it.
        projector: its projector file, if somebody names one.
        beside: whether one may be looked for in the same folder.

    Raises:
        CheckpointError: a header is damaged, or the projector named is another model's.
    """
    text = GGUFFile(path, reference)
    if projector is not None:
        return _joined(text, projector)
    if text.metadata.arch != PROJECTOR and has_tower(text.metadata):
        return _in_one_file(text)
    found = _beside(path) if beside and text.metadata.arch != PROJECTOR else None
    try:
        return text if found is None else _joined(text, found)
    except CheckpointError as error:
        _log.warning("a projector beside the model is left out: %s", error)
        return text


def _in_one_file(text: GGUFFile) -> Checkpoint:
    """The text model with the tower in its own file; without, where it is of a kind that is not known here."""
    layout = projector_layout(text.metadata)
    if layout is None:
        _log.warning("%s: the vision tower of a %s is not supported in one file", text.reference, text.metadata.arch)
        return text
    return SeeingGGUF(text, Projector(text.header, text.metadata, layout), None)


def _joined(text: GGUFFile, path: Path) -> Checkpoint:
    """The text model with a projector's tower; without, where it is of a kind that is not known here."""
    file = GGUFFile(path, str(path))
    layout = projector_layout(file.metadata, text.metadata.arch) if file.metadata.arch == PROJECTOR else None
    if layout is None:
        kind = projector_type(file.metadata) if file.metadata.arch == PROJECTOR else file.metadata.arch
        _log.warning("%s: a projector of type %r is not supported; the model takes text only", path, kind)
        return text
    joined = Projector(file.header, file.metadata, layout)
    joined.check(text.metadata)
    _log.info("%s sees by the projector %s", text.reference, path)
    return SeeingGGUF(text, joined, path)


def _beside(path: Path) -> Path | None:
    """The only projector file in a model's folder."""
    try:
        names = sorted(each.name for each in path.parent.iterdir() if each.suffix == ".gguf")
    except OSError:
        return None
    found = [path.parent / name for name in names if _MARK in name.lower() and name != path.name]
    if len(found) > 1:
        _log.info("%d projectors lie beside %s; none is taken", len(found), path)
    return found[0] if len(found) == 1 else None
