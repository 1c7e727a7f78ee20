"""Fixtures of all tests. The device is prepared here, before anything imports MLX."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from models import backend

backend.prepare()

from runner import default_model as default_model_module  # noqa: E402 - the device comes first
from runner.config import DialectName, cache_folder  # noqa: E402
from runner.parent import Child, spawn  # noqa: E402

PARITY = Path(__file__).parent / "parity"
SpawnRunner = Callable[..., AbstractAsyncContextManager[Child]]


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of tiny checkpoints."""
    return PARITY


@pytest.fixture(scope="session")
def tiny_llama(parity: Path) -> Path:
    """A Llama of a few thousand weights, as a Hugging Face folder."""
    return parity / "llama_gqa"


@pytest.fixture(scope="session")
def default_model() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, fetched once for this machine. Only CI insists on it."""
    try:
        return default_model_module.fetch(cache_folder(os.environ), lambda _: None)
    except default_model_module.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def spawn_runner(tiny_llama: Path) -> SpawnRunner:
    """Starts real runner processes: `async with spawn_runner(dialect=DialectName.MLX) as child`."""

    def start(
        model: str | Path | None = tiny_llama, dialect: DialectName = DialectName.MLX, **more
    ) -> AbstractAsyncContextManager[Child]:
        return spawn(model, dialect=dialect, **more)

    return start


@pytest.fixture
def roomy_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with a context of ten million tokens: its prefill can take as long as a test wants."""
    folder = tmp_path / "roomy"
    shutil.copytree(tiny_llama, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 10_000_000}))
    return folder
