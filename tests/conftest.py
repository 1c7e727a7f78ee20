"""Fixtures of all tests. The BLAS is put under MLX here, before anything imports it."""

import gc
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from models.image import blas

# One thread: more of them spin while they wait for each other, which takes the cores from what runs beside the test.
blas.prepare(threads=1)
# A shell lets what it starts in the background ignore Ctrl-C, and children inherit that; tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # So does nohup with the hangup. A handler that does nothing keeps it from us, and children have the default again.
    signal.signal(signal.SIGHUP, lambda *_: None)

from runner import default_model as default_model_module  # noqa: E402 - the device comes first
from runner.config import DialectName  # noqa: E402
from runner.folders import cache_folder  # noqa: E402
from runner.parent import Child, spawn  # noqa: E402
from tests.bench.commands import PreparationError  # noqa: E402
from tests.bench.embed_preparation import fetch_minilm  # noqa: E402
from tests.image_pipelines import fill_store, write_wide_pipeline  # noqa: E402

PARITY = Path(__file__).parent / "parity"
SpawnRunner = Callable[..., AbstractAsyncContextManager[Child]]


def pytest_collection_finish() -> None:
    """Take what thousands of collected tests hold out of the collector's sight.

    Every engine that is closed has the garbage collected, which looked at all of it each time: a quarter of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder of tiny checkpoints."""
    return PARITY


@pytest.fixture(scope="session")
def tiny_llama(parity: Path) -> Path:
    """A Llama of a few thousand weights, as a Hugging Face folder."""
    return parity / "llama_gqa"


@pytest.fixture(scope="session")
def parity_embedding() -> Path:
    """The folder of tiny embedding models."""
    return PARITY.parent / "parity_embedding"


@pytest.fixture(scope="session")
def tiny_bert(parity_embedding: Path) -> Path:
    """A BERT of a few thousand weights that makes embeddings, as a Hugging Face folder."""
    return parity_embedding / "bert"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as a folder, fetched once for this machine. Only CI insists on it."""
    try:
        return fetch_minilm(cache_folder(os.environ), lambda _: None)
    except PreparationError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_pipeline() -> Path:
    """A Z-Image pipeline of a few thousand weights, as a diffusers folder."""
    return PARITY.parent / "parity_image" / "z_image"


@pytest.fixture(scope="session")
def wide_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with other random weights, wide enough for every quantisation."""
    return write_wide_pipeline(tmp_path_factory.mktemp("wide") / "pipeline")


@pytest.fixture(scope="session")
def pipeline_store(wide_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Ollama store with that pipeline as it is (`p`) and in every quantisation (`p-int4`)."""
    return fill_store(wide_pipeline, tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="session")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with heads of 32 dimensions, which a quantised cache needs."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    shutil.copytree(tiny_llama, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"head_dim": 32, "max_position_embeddings": 4096}))
    heads = {"q_proj": config["num_attention_heads"], "o_proj": config["num_attention_heads"]}
    generator = np.random.default_rng(5)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        if part in {"q_proj", "k_proj", "v_proj", "o_proj"}:
            wide = 32 * heads.get(part, config["num_key_value_heads"])
            shape = (len(tensor), wide) if part == "o_proj" else (wide, tensor.shape[1])
            tensors[name] = generator.normal(0, 0.3, shape).astype(tensor.dtype)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


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
