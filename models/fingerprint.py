"""What tells a model's numbers from another's without reading its weights."""

import hashlib
import json
from pathlib import Path

from models.checkpoint import Checkpoint


def fingerprint(checkpoint: Checkpoint, *form: str) -> str:
    """A digest of the checkpoint's configuration and files, and of `form`: how its weights are held and computed with.

    A file is known by path, size and time; a blob of the Ollama store by its name, which is a digest. Thread: any.

    Raises:
        ModelError: a header cannot be read.
    """
    files = sorted({info.file for info in checkpoint.infos()})
    described = [checkpoint.config, [_described(file) for file in files], form]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _described(file: str) -> list[str | int]:
    try:
        stat = Path(file).stat()
    except OSError:
        # A label: the path of a blob and the name of the tensor in it.
        return [file]
    return [file, stat.st_size, stat.st_mtime_ns]
