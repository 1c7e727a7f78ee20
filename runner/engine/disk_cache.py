"""DiskCache: what the prefix cache holds, kept in files for the next process that serves the same model.

Rows are cut into blocks of BLOCK_TOKENS. A block's file is named by a digest of all tokens up to its end, so that one
look says whether it is there, whoever wrote it; a file never changes, and several processes may share the folder. It is
a safetensors file of the tokens and a segment's arrays, with a checksum: `DIR/<model>/<block>.safetensors`.

Owns the folder, the format and the thread that writes, and refuses to know what the arrays mean. Segments are read and
copied in the executor's thread; the writer sees bytes only. Whatever goes wrong with a file costs the saving, never a
request.
"""

import hashlib
import io
import json
import logging
import os
import re
import secrets
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import psutil

from models.errors import CheckpointError
from models.executors.base import Checkpoint, HostArray, Segment
from models.executors.segment_file import StoredArray, arrays, stored
from models.sources.safetensors_file import SafetensorsFile, open_safetensors

FORMAT = "ollama-mlx-runner prefix 4"
"""To be counted up with every change of the files or of what the executors keep of a row."""
BLOCK_TOKENS = 64
MAX_PENDING_BYTES = 256 << 20
"""What may wait for the disk; beyond it blocks are left out."""
DRAIN_S = 0.3
"""What writing may still take when the engine is closed: after a grace of 3 s the process has 0.7 s to leave."""
KEPT_SHARE = 0.9
"""Of the limit, after files had to go: so that not every new file has all of them looked through."""
STALE_S = 600.0
"""A file in the making is older than this only if its writer has died."""
WRITE_BYTES = 1 << 20
"""Between pieces of this size the writer looks whether it should stop."""

_TOKENS = "tokens"
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_PART = re.compile(r"\.[0-9a-f]{32}\.(\d+)\.[0-9a-f]{8}\.part")

logger = logging.getLogger(__name__)

ReadSegment: TypeAlias = Callable[[Mapping[str, HostArray], int], Segment]
"""Makes a segment of so many tokens of a file's arrays by name. Raises ValueError where no such segment has them."""
ReadCheckpoint: TypeAlias = Callable[[Mapping[str, HostArray]], Checkpoint]
"""The same of a checkpoint."""
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Block:
    """The place of one block: which tokens of a row, and the file's name."""

    begin: int
    tokens: bytes
    """int64, little-endian: where a picture stands, a number that is made of what it shows."""
    name: str

    @property
    def end(self) -> int:
        """The first token behind it."""
        return self.begin + BLOCK_TOKENS

    @property
    def checkpoint_name(self) -> str:
        """The file with the checkpoint behind it."""
        return f"{hashlib.blake2b(self.name.encode(), digest_size=16, person=b'checkpoint').hexdigest()}.safetensors"


def blocks(tokens: Sequence[int]) -> Iterator[Block]:
    """The whole blocks of a row, from its beginning."""
    raw = struct.pack(f"<{len(tokens)}q", *tokens)
    digest = b""
    for begin in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        own = raw[8 * begin : 8 * (begin + BLOCK_TOKENS)]
        digest = hashlib.blake2b(digest + own, digest_size=16).digest()
        yield Block(begin, own, f"{digest.hex()}.safetensors")


class _StoppedError(Exception):
    """The process ends; the file in the making is given up."""


class _ForeignError(Exception):
    """A sound file that is not what this cache would have written under its name."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What the writer does next: write a file if there are arrays, then note that these files were of use."""

    name: str
    arrays: tuple[StoredArray, ...]
    used: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(array.data) for array in self.arrays)


class DiskCache:
    """Blocks of rows' state in a folder. Thread: the executor's, but for the writer's own."""

    def __init__(self, folder: Path, model: str, *, limit_bytes: int) -> None:
        """Open the folder, and clear what dead writers left.

        Args:
            folder: The folder, perhaps shared with other models and processes; made if need be.
            model: What tells this model's numbers from another's; a name for a folder.
            limit_bytes: What the files of all models may take together, in bytes.

        Raises:
            OSError: the folder cannot be made or written.
        """
        self._root = folder
        self._folder = folder / model
        # Prompts can be read out of keys: nobody else's business.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(self._folder))
        self._limit_bytes = limit_bytes
        # Processes of two containers may have the same number.
        self._token = secrets.token_hex(4)
        self._warned = False
        self._jobs: deque[_Job] = deque()
        self._pending: set[str] = set()
        self._pending_bytes = 0
        self._changed = threading.Condition()
        self._draining = False
        self._stop = threading.Event()
        self._used_bytes = 0
        self._writer = threading.Thread(target=self._write_all, name="prefix writer", daemon=True)
        self._writer.start()

    def read(self, tokens: Sequence[int], begin: int, read_segment: ReadSegment) -> Iterator[tuple[int, Segment]]:
        """The blocks that follow each other from the token `begin` on: each one's end, and its segment.

        The first may begin before `begin`. Ends at the first block that is not there or not sound.
        """
        if len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS <= begin:
            return
        used: list[str] = []
        try:
            for block in blocks(tokens):
                if block.end > begin:
                    segment = self._load(block.name, block.tokens, lambda held: read_segment(held, BLOCK_TOKENS))
                    if segment is None:
                        return
                    yield block.end, segment
                used.append(block.name)
        finally:
            if used:
                self._put(_Job("", (), tuple(used)))

    def read_checkpoint(
        self, tokens: Sequence[int], beyond: int, read: ReadCheckpoint
    ) -> tuple[int, Checkpoint | None]:
        """The last checkpoint within `tokens` behind more than `beyond` of them, and where it is; else None."""
        for block in reversed([block for block in blocks(tokens) if block.end > beyond]):
            checkpoint = self._load(block.checkpoint_name, block.tokens, read)
            if checkpoint is not None:
                self._put(_Job("", (), (block.checkpoint_name,)))
                return block.end, checkpoint
        return 0, None

    def write(
        self,
        tokens: Sequence[int],
        copy: Callable[[int, int], Segment | None],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Have a row's whole blocks written as far as they are not there.

        Args:
            tokens: The row's.
            copy: Gives the segment of the tokens [begin, end); None if the row does not hold them any more.
            checkpoint: The one behind all tokens; written where they are whole blocks.
        """
        chain: list[str] = []
        for block in blocks(tokens):
            chain.append(block.name)
            if block.name in self._pending or (self._folder / block.name).exists():
                continue
            if self._pending_bytes >= MAX_PENDING_BYTES:
                return
            segment = copy(block.begin, block.end)
            if segment is None:
                return
            # A block is of use only with those before it, so it is not to outlive them.
            self._put(_Job(block.name, _copied(block.tokens, segment), tuple(chain)))
        if checkpoint is not None and tokens and not len(tokens) % BLOCK_TOKENS:
            *_, last = blocks(tokens)
            name = last.checkpoint_name
            if name not in self._pending and not (self._folder / name).exists():
                self._put(_Job(name, _copied(last.tokens, checkpoint), (*chain, name)))

    def close(self) -> None:
        """Write what waits, for DRAIN_S at most; leave no file in the making. Idempotent."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
        self._writer.join(DRAIN_S)
        self._stop.set()
        self._writer.join()
        if lost := len(self._jobs):
            logger.info("prefix cache not written in full", extra={"fields": {"blocks": lost}})

    def _load(self, name: str, tokens: bytes, read: Callable[[Mapping[str, HostArray]], Read]) -> Read | None:
        path = self._folder / name
        try:
            return _decoded(open_safetensors(path, str(path)), tokens, read)
        except CheckpointError as error:
            match error.__cause__:
                case FileNotFoundError():
                    pass
                case OSError():
                    self._warn("a file of the prefix cache cannot be read", error.reason, path)
                case _:
                    self._warn("a damaged file of the prefix cache was removed", error.reason, path)
                    with suppress(OSError):
                        path.unlink()
        except _ForeignError as error:
            self._warn("a file in the prefix cache's folder is not the cache's own", str(error), path)
        return None

    def _warn(self, message: str, reason: str, path: Path) -> None:
        """Once in a process: what befalls one file befalls many."""
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        logger.log(level, message, extra={"fields": {"reason": reason, "file": str(path)}})

    def _put(self, job: _Job) -> None:
        with self._changed:
            if job.arrays:
                self._pending.add(job.name)
                self._pending_bytes += job.nbytes
            self._jobs.append(job)
            self._changed.notify_all()

    # The writer's thread from here on.

    def _write_all(self) -> None:
        """Until the cache is closed and nothing waits, or too much of it."""
        with suppress(_StoppedError):
            self._sweep()
            while (job := self._next()) is not None:
                self._do(job)
                with self._changed:
                    self._jobs.popleft()
                    self._pending.discard(job.name)
                    self._pending_bytes -= job.nbytes

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._jobs and not self._draining:
                self._changed.wait()
            return self._jobs[0] if self._jobs else None

    def _do(self, job: _Job) -> None:
        try:
            if job.arrays:
                self._write(job)
                self._used_bytes += job.nbytes
                if self._used_bytes > self._limit_bytes:
                    self._sweep()
            self._note_use(job.used)
        except OSError as error:
            self._warn("the prefix cache cannot be written", str(error), self._folder / job.name)

    def _write(self, job: _Job) -> None:
        """All or nothing: a file has its name only when it is complete. No fsync: a torn file is known by its sum."""
        part = self._folder / f".{job.name.removesuffix('.safetensors')}.{os.getpid()}.{self._token}.part"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for piece in (_header(job.arrays), *(array.data for array in job.arrays)):
                    for begin in range(0, len(piece), WRITE_BYTES):
                        if self._stop.is_set():
                            raise _StoppedError
                        _write_fully(file, piece[begin : begin + WRITE_BYTES])
            part.replace(self._folder / job.name)
        finally:
            part.unlink(missing_ok=True)

    def _note_use(self, names: Iterable[str]) -> None:
        """Files are as old as their last use, and a row's later blocks a little older than those they rest on."""
        now = time.time_ns()
        for index, name in enumerate(names):
            if self._stop.is_set():
                raise _StoppedError
            with suppress(FileNotFoundError):
                os.utime(self._folder / name, ns=(now - index, now - index))

    def _sweep(self) -> None:
        """Count what there is, remove the longest unused as far as the limit asks, and what dead writers left."""
        files: list[tuple[int, int, Path]] = []
        for path in self._root.glob("*/*"):
            try:
                stat = path.stat()
                if (part := _PART.fullmatch(path.name)) is not None:
                    if _is_stale(int(part[1]), stat.st_mtime_ns):
                        path.unlink()
                elif _NAME.fullmatch(path.name):
                    files.append((stat.st_mtime_ns, stat.st_size, path))
            except OSError:
                # Another process was faster.
                continue
        self._used_bytes = sum(size for _, size, _ in files)
        if self._used_bytes > self._limit_bytes:
            self._remove_oldest(files)

    def _remove_oldest(self, files: list[tuple[int, int, Path]]) -> None:
        for _, size, path in sorted(files):
            if self._used_bytes <= self._limit_bytes * KEPT_SHARE:
                return
            with suppress(OSError):
                path.unlink()
                self._used_bytes -= size


def _write_fully(file: io.RawIOBase, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def _is_stale(writer: int, written_ns: int) -> bool:
    """Whether nobody will complete a file; a process of another container looks dead, and does without that file."""
    return not psutil.pid_exists(writer) or time.time_ns() - written_ns > STALE_S * 1e9


def _copied(tokens: bytes, held: Segment | Checkpoint) -> tuple[StoredArray, ...]:
    """A block's arrays as bytes. Waits for them."""
    return (StoredArray(_TOKENS, "I64", (BLOCK_TOKENS,), tokens), *stored(held))


def _header(written: Sequence[StoredArray]) -> bytes:
    """What a safetensors file begins with. Source: safetensors 0.5, README, "Format"."""
    entries: dict[str, object] = {}
    end, checksum = 0, 0
    for array in written:
        begin, end = end, end + len(array.data)
        entries[array.key] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": (begin, end)}
        checksum = zlib.crc32(array.data, checksum)
    text = json.dumps({"__metadata__": {"format": FORMAT, "crc32": f"{checksum:08x}"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _decoded(file: SafetensorsFile, tokens: bytes, read: Callable[[Mapping[str, HostArray]], Read]) -> Read:
    """What a file holds.

    Raises:
        CheckpointError: it is damaged.
        _ForeignError: it is sound, but not the cache's, or not for these tokens.
    """
    if file.metadata.get("format") != FORMAT:
        raise _ForeignError(f"its format is {file.metadata.get('format')!r}, not {FORMAT!r}")
    begin = min((entry.begin for entry in file.tensors.values()), default=0)
    try:
        with file.path.open("rb") as opened:
            opened.seek(begin)
            data = memoryview(opened.read())
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file.label) from error
    if file.metadata.get("crc32") != f"{zlib.crc32(data):08x}":
        raise CheckpointError("its checksum is wrong", file=file.label)
    first, *entries = sorted(file.tensors.values(), key=lambda entry: entry.begin)
    if first.key != _TOKENS or data[: first.nbytes] != tokens:
        raise _ForeignError("it is for other tokens")
    try:
        return read(arrays(entries, data, begin))
    except ValueError as error:
        raise _ForeignError(str(error)) from error
