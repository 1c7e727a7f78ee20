"""Pictures in chats through real Ollama servers: who sends what, and that another picture has another answer."""

import base64
import json
import subprocess
import sys

import pytest

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")

from tests.ollama import record  # noqa: E402
from tests.ollama.programs import VERSIONS  # noqa: E402
from tests.ollama.server import RUNNER, Server  # noqa: E402
from tests.ollama.store import Store  # noqa: E402

pytestmark = [
    pytest.mark.ollama,
    pytest.mark.timeout(180),
    pytest.mark.parametrize("version", ["classic", "newest"], indirect=True, scope="module"),
]
MODELS = {
    "classic": ("gemma3", "qwen2_5_vl", "mistral3_vl", "llava"),
    "newest": ("gemma4_vl", "qwen3_5_vl", "qwen3_vl"),
}
"""Pairs of GGUF files for the one, folders for the other."""
GREEDY = {"temperature": 0, "num_predict": 8}
TEMPLATE = "{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}<assistant>"


@pytest.fixture(scope="module")
def server(version, parity, tmp_path_factory):
    """A server with the models of its kind, whose runner's requests are kept."""
    folder = tmp_path_factory.mktemp("vision")
    script = folder / "recorder"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{record.__file__}" "$@"\n')
    script.chmod(0o755)
    store, fixtures = Store(folder / "models"), parity.with_name("parity_vision")
    for name in MODELS["classic"] if version == VERSIONS["classic"] else ():
        pair = fixtures / "projectors" / name
        store.add_gguf(name, pair / "model.gguf", projector=pair / "mmproj.gguf", template=TEMPLATE)
    for name in MODELS["newest"] if version == VERSIONS["newest"] else ():
        command = [RUNNER, "create", name, "--from", fixtures / name, "--store", store.folder]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    kept = {"OLLAMA_MLX_RUNNER_RECORDED": RUNNER, "OLLAMA_MLX_RUNNER_RECORD": folder / "record"}
    with Server(version, store, folder, runner=script, **kept) as running:
        yield running


@pytest.fixture(params=["gemma", "qwen", "qwen3_vl", "mistral", "llava"])
def model(request, server):
    names = MODELS["classic" if server.version == VERSIONS["classic"] else "newest"]
    name = next((each for each in names if each.startswith(request.param)), None)
    if name is None:
        pytest.skip("this version's engine takes no pictures for that family")
    return name


@pytest.fixture(scope="module")
def pictures(parity):
    return [path.read_bytes() for path in sorted((parity.with_name("parity_vision") / "pictures").glob("*.png"))]


def asked(server):
    """The last request that reached a runner: its prompt, and its pictures by their numbers."""
    requests = (server.home / "record").glob("*completion*.request")
    body = json.loads(max(requests, key=lambda file: file.stat().st_mtime_ns).read_bytes())
    return body["Prompt"], {each["id"]: base64.b64decode(each["data"]) for each in body.get("Media") or body["Images"]}


def chat(server, model, *messages):
    told = [{"role": role, "content": content, "images": list(images)} for role, content, *images in messages]
    return server.client.chat(model, told, options=GREEDY)


def test_a_picture_reaches_the_model_and_another_one_has_another_answer(server, model, pictures):
    answers = [chat(server, model, ("user", "the fox", picture)) for picture in (*pictures, pictures[0])]
    prompt, sent = asked(server)
    assert "[img-0]" in prompt
    assert sent == {0: pictures[0]}
    said = [(answer.message.content, answer.message.thinking) for answer in answers]
    assert said[0] == said[2]
    assert said[0] != said[1]
    words = chat(server, model, ("user", "the fox"))
    assert answers[0].prompt_eval_count > words.prompt_eval_count, "places of pictures count as tokens of the prompt"


def test_pictures_of_several_turns_are_numbered_through(server, model, pictures):
    first, second = pictures
    answer = chat(
        server, model, ("user", "the fox", first), ("assistant", "jumps"), ("user", "and the dog", second, first)
    )
    prompt, sent = asked(server)
    assert answer.done
    assert {number for number in range(3) if f"[img-{number}]" in prompt} == set(sent) == {0, 1, 2}
    assert sent == {0: first, 1: second, 2: first}


def test_a_broken_picture_is_told_and_the_next_request_works(server, model, pictures):
    with pytest.raises(ollama.ResponseError) as refused:
        chat(server, model, ("user", "the fox", pictures[0][:60]))
    assert refused.value.status_code in (400, 500)
    assert chat(server, model, ("user", "the fox", pictures[0])).done


def test_show_says_that_the_model_sees(server, model):
    assert "vision" in server.client.show(model).capabilities
