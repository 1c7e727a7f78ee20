"""Fixtures of the tests with real Ollama servers; `make test-ollama` builds these and runs the tests."""

import json
import shutil

import pytest

from tests.ollama.programs import VERSIONS, skip_without
from tests.ollama.store import CHATML, Store, with_context

THINKING = (
    "{{ range .Messages }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}"
    f"{CHATML}{{{{ if .Think }}}}<think>{{{{ end }}}}"
)


FISH = {"system": "You are a fish.", "parameters": {"temperature": 0, "num_predict": 5}}


def pytest_collection_modifyitems(config, items):
    if "ollama" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("ollama"):
                item.add_marker(pytest.mark.skip(reason="`make test-ollama` runs these"))


@pytest.fixture(scope="session")
def store(tmp_path_factory, parity, default_model):
    """tiny (context 128), fish (with parameters), roomy (ten million tokens), smol (a real model), thinker."""
    folder = tmp_path_factory.mktemp("ollama")
    store = Store(folder / "models")
    store.add("tiny", parity / "llama_gqa")
    store.add("fish", parity / "qwen3", **FISH)
    store.add("roomy", roomy(parity, folder))
    store.add("smol", default_model)
    store.add("thinker", parity / "llama_gqa", template=THINKING, capabilities=("completion", "thinking"))
    store.add_image("picture")
    yield store
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def gguf_store(tmp_path_factory, parity, parity_embedding, default_model):
    """The same models as GGUF files, for the classic parent, and those that make embeddings, by their families."""
    folder = tmp_path_factory.mktemp("ollama")
    store = Store(folder / "models")
    store.add_gguf("tiny", parity / "llama_gqa.gguf")
    store.add_gguf("fish", parity / "qwen3_yarn.gguf", **FISH)
    store.add_gguf("roomy", with_context(parity / "llama_gqa.gguf", folder / "roomy.gguf", 10_000_000))
    store.add_gguf("smol", default_model)
    store.add_gguf("thinker", parity / "llama_gqa.gguf", template=THINKING)
    for file in parity_embedding.glob("*.gguf"):
        store.add_gguf(file.stem, file, template="")
    store.add_image("picture")
    yield store
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def store_for(request):
    """The store with the models that a version runs by this runner."""
    return lambda version: request.getfixturevalue("gguf_store" if version == VERSIONS["classic"] else "store")


def roomy(parity, folder):
    target = folder / "roomy"
    shutil.copytree(parity / "llama_gqa", target)
    config = target / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 10_000_000}))
    return target


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    skip_without(f"ollama-{VERSIONS[request.param]}")
    return VERSIONS[request.param]


@pytest.fixture
def start(version, store_for, tmp_path):
    """Starts a server of this test's own: `with start(OLLAMA_NUM_PARALLEL=8) as server`."""
    from tests.ollama.server import Server

    return lambda store=None, **more: Server(version, store or store_for(version), tmp_path, **more)


@pytest.fixture(scope="module")
def server(version, store_for, tmp_path_factory):
    from tests.ollama.server import Server

    with Server(version, store_for(version), tmp_path_factory.mktemp("home")) as running:
        yield running
