"""The Ollama store as a place to write: blobs named by their digest, then a manifest that names them.

Invariants: a file under its final name is whole and on the disk; a manifest appears only after its blobs; what a
failed writer made and no manifest names is removed. One writer of ours at a time works in a store: it holds a lock on
the folder of blobs, which leaves nothing behind, not even after a kill.

Source: ollama v0.34.4 manifest/layer.go, manifest/manifest.go, server/images.go for form, modes and pruning.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from models.errors import StoreError
from models.sources.base import JSON
from models.sources.model_name import ModelName
from models.sources.ollama import Layer
from models.store.content import Content
from models.store.go_json import go_json

# Ollama removes files of that form from its blobs when it starts and they are an hour old.
_TEMPORARY = "sha256-create-"
_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def _ignore_bytes(count: int) -> None:
    pass


def _ignore_note(note: str) -> None:
    pass


@contextlib.contextmanager
def store_writer(store: Path, note: Callable[[str], None] = _ignore_note) -> Iterator["StoreWriter"]:
    """Write into a store, alone among our processes; what ends up in no manifest is removed in the end.

    Args:
        store: the folder; it is created if it is missing.
        note: told what a person should know while waiting.

    Raises:
        OSError: the store cannot be written.
    """
    writer = StoreWriter(store, note)
    try:
        writer.begin()
        yield writer
    finally:
        writer.end()


class StoreWriter:
    """A store that is being written, see `store_writer`. Thread: one, any."""

    def __init__(self, store: Path, note: Callable[[str], None]) -> None:
        self._store = store
        self._blobs = store / "blobs"
        self._note = note
        self._lock: int | None = None
        self._alone = False
        self._made_folders: list[Path] = []
        self._made_blobs: list[Path] = []
        self._sizes: Counter[int] = Counter()

    def begin(self) -> None:
        """Create the folders, wait for other writers, and remove what killed ones left half written."""
        self._alone = self._take_lock()
        self._sweep()
        self._sizes.update(path.stat().st_size for path in self._blobs.iterdir())

    def end(self) -> None:
        """Remove what is ours and named by no manifest, then let the next writer in."""
        try:
            self._sweep()
            if self._made_blobs:
                self._remove(path.name for path in self._made_blobs if path.name not in named_blobs(self._store)[0])
            for folder in reversed(self._made_folders):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def reusable_bytes(self, sizes: Sequence[int]) -> int:
        """How many of these blobs' bytes may already be here, as far as sizes tell."""
        return sum(size * count for size, count in (Counter(sizes) & self._sizes).items())

    def add(
        self,
        content: Content,
        media_type: str,
        name: str = "",
        advance: Callable[[int], None] = _ignore_bytes,
    ) -> Layer:
        """Store a blob unless it is here, and describe it for the manifest.

        Args:
            content: its bytes.
            media_type: what it is to Ollama.
            name: the layer's name: a tensor's, or a configuration file's path.
            advance: told how many more bytes are done.

        Raises:
            CheckpointError: a source file cannot be read.
            OSError: the store cannot be written.
        """
        digest = self._stored(content)
        if digest is None:
            digest = self._write(content, advance)
        else:
            advance(content.size)
        return Layer(media_type, f"sha256:{digest}", content.size, name)

    def publish(self, name: ModelName, config: Layer, layers: Sequence[Layer]) -> None:
        """Write the manifest; what only its predecessor named is removed.

        Raises:
            StoreError: a blob has gone meanwhile.
            OSError: the store cannot be written.
        """
        for layer in (config, *layers):
            path = self._path(layer.digest)
            if not path.is_file() or path.stat().st_size != layer.size:
                raise StoreError(f"{path}: somebody removed or changed this blob meanwhile; create the model again")
        _sync_folder(self._blobs)
        target = manifest_path(name, self._store)
        self._make_folder(target.parent)
        before = _blobs_of(target) or set()
        fields: list[JSON] = [_layer_json(layer) for layer in layers]
        manifest: dict[str, JSON] = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": _layer_json(config),
            "layers": fields,
        }
        # Beside the manifests Ollama would take it for one.
        with self._temporary() as (temporary, file):
            file.write(go_json(manifest) + b"\n")
            _finish(file)
            temporary.replace(target)
        _sync_folder(target.parent)
        self._made_folders.clear()
        named, complete = named_blobs(self._store)
        if complete:
            self._remove(before - named)

    def _stored(self, content: Content) -> str | None:
        """The digest of a content that is here whole. The time of the blob is renewed: Ollama prunes old ones."""
        if content.size not in self._sizes:
            return None
        digest = content.sha256()
        path = self._path(digest)
        try:
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == digest
            if whole:
                os.utime(path)
        except FileNotFoundError:
            return None
        except PermissionError:
            # It is whole but another user's, so its time stays.
            return digest
        return digest if whole else None

    def _write(self, content: Content, advance: Callable[[int], None]) -> str:
        sha256 = hashlib.sha256()
        with self._temporary() as (temporary, file):
            for chunk in content.chunks():
                file.write(chunk)
                sha256.update(chunk)
                advance(len(chunk))
            _finish(file)
            path = self._path(sha256.hexdigest())
            if not path.exists():
                self._made_blobs.append(path)
            temporary.replace(path)
        self._sizes[content.size] += 1
        return sha256.hexdigest()

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        path = self._blobs / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with path.open("xb") as file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._blobs / f"sha256-{digest.removeprefix('sha256:')}"

    def _take_lock(self) -> bool:
        """Whether we are the only writer: file systems without locks let several in."""
        while self._lock is None:
            self._make_folder(self._blobs)
            descriptor: int | None = os.open(self._blobs, os.O_RDONLY | os.O_DIRECTORY)
            assert descriptor is not None
            try:
                alone = self._wait_for(descriptor)
                if _is_still(self._blobs, descriptor):
                    self._lock, descriptor = descriptor, None
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        return alone

    def _wait_for(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._note(f"waiting for another create in {self._store}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _make_folder(self, folder: Path) -> None:
        missing = [folder, *folder.parents]
        missing = missing[: next(index for index, path in enumerate(missing) if path.exists())]
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o755)
                self._made_folders.append(path)

    def _sweep(self) -> None:
        """Remove what is half written: by a writer that was killed, or by us if a signal came between two lines."""
        if self._alone:
            self._remove(path.name for path in self._blobs.glob(f"{_TEMPORARY}*"))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (self._blobs / name).unlink(missing_ok=True)


def manifest_path(name: ModelName, store: Path) -> Path:
    """Where a model's manifest is, or will be."""
    found = name.manifest(store)
    return found or store / "manifests" / name.host / name.namespace / name.model / name.tag


def named_blobs(store: Path) -> tuple[set[str], bool]:
    """The files of all blobs that a manifest names, and whether every manifest could be read."""
    named: set[str] = set()
    complete = True
    for path in store.glob("manifests/*/*/*/*"):
        blobs = _blobs_of(path)
        named |= blobs or set()
        complete = complete and blobs is not None
    return named, complete


def read_manifest(path: Path) -> JSON:
    """A manifest as it stands; None if it is missing or damaged."""
    try:
        value: JSON = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value


def _blobs_of(manifest: Path) -> set[str] | None:
    """The files of the blobs that a manifest names; None if it is no manifest."""
    match read_manifest(manifest):
        case {"config": config, "layers": [*layers]}:
            entries = [config, *layers]
            return {
                str(entry["digest"]).replace(":", "-", 1)
                for entry in entries
                if isinstance(entry, dict) and "digest" in entry
            }
    return None


def _is_still(folder: Path, descriptor: int) -> bool:
    """Whether the open folder is the one there: the writer before may have failed and taken its empty folder away."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def _layer_json(layer: Layer) -> dict[str, JSON]:
    fields: dict[str, JSON] = {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
    return fields | {"name": layer.name} if layer.name else fields


def _finish(file: BinaryIO) -> None:
    """Give a written file Ollama's mode and let it reach the disk."""
    file.flush()
    os.fchmod(file.fileno(), 0o644)
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
