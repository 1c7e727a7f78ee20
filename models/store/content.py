"""What a blob will hold: pieces in memory and spans of source files, read in chunks as often as it is asked for."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from models.errors import CheckpointError
from models.sources.base import JSON
from models.sources.tensor_table import Member
from models.store.go_json import go_json

CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a source file; `label` is what messages call it."""

    path: Path
    label: str
    begin: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                left = self.size
                while left:
                    chunk = file.read(min(left, CHUNK))
                    if not chunk:
                        raise CheckpointError("the file was cut short while it was being read", file=self.label)
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", file=self.label) from error


Piece: TypeAlias = Span | bytes


@dataclass(frozen=True, slots=True)
class Content:
    """A blob's bytes."""

    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(piece_size(piece) for piece in self.pieces)

    def chunks(self) -> Iterator[bytes]:
        """All bytes in order. Raises as `Span.chunks` does."""
        for piece in self.pieces:
            if isinstance(piece, Span):
                yield from piece.chunks()
            else:
                yield piece

    def sha256(self) -> str:
        """The digest in hexadecimal. Raises as `Span.chunks` does."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def piece_size(piece: Piece) -> int:
    """In bytes."""
    return piece.size if isinstance(piece, Span) else len(piece)


def span_of(member: Member) -> Span:
    """The data of a stored tensor."""
    return Span(member.file.path, member.file.label, member.stored.begin, member.stored.nbytes)


def span_of_file(path: Path) -> Span:
    """A whole file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return Span(path, str(path), 0, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=str(path)) from error


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def safetensors_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data, whose tensors follow in the order of `entries`.

    Source: ollama v0.32.5 x/safetensors/extractor.go: keys sorted, padded to eight bytes with blanks.
    """
    header: dict[str, JSON] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    # Only the map's keys are sorted; an entry's fields have the order of Go's struct.
    text = go_json({key: header[key] for key in sorted(header)})
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_content(entries: Sequence[Entry], pieces: Iterable[Piece], metadata: Mapping[str, str]) -> Content:
    """A safetensors file of tensors whose data are `pieces`, in order."""
    content = Content((safetensors_header(entries, metadata), *pieces))
    assert content.size == len(content.pieces[0]) + sum(entry.nbytes for entry in entries)  # type: ignore[arg-type]
    return content
