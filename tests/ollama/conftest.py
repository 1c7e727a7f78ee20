"""Fixtures of the tests with real Ollama servers; `make test-ollama` builds these and runs the tests."""

import json
import shutil

import pytest

from tests.ollama.store import CHATML, Store

THINKING = (
    "{{ range .Messages }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}"
    f"{CHATML}{{{{ if .Think }}}}<think>{{{{ end }}}}"
)


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
    store.add("fish", parity / "qwen3", system="You are a fish.", parameters={"temperature": 0, "num_predict": 5})
    store.add("roomy", roomy(parity, folder))
    store.add("smol", default_model)
    store.add("thinker", parity / "llama_gqa", template=THINKING, capabilities=("completion", "thinking"))
    store.add_image("picture")
    yield store
    shutil.rmtree(folder)


def roomy(parity, folder):
    target = folder / "roomy"
    shutil.copytree(parity / "llama_gqa", target)
    config = target / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 10_000_000}))
    return target
