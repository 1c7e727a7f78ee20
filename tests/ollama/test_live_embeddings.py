"""Embeddings through the last Ollama that asks its child for them: by command line, HTTP and Python client."""

import json

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")
httpx = pytest.importorskip("httpx", reason="comes with Ollama's Python client")

from tests.ollama.server import run_ollama  # noqa: E402
from tests.parity_embedding.texts import TEXTS  # noqa: E402

pytestmark = [
    pytest.mark.ollama,
    pytest.mark.timeout(180),
    pytest.mark.parametrize("version", ["classic"], indirect=True, scope="module"),
]
BATCH = [f"{'the fox ' * (1 + number % 9)}{number}" for number in range(64)]
LONG = "the fox said that she sells sea shells " * 30
FAMILIES = ("bert", "embedding_gemma", "nomic_bert", "qwen3_embedding", "xlm_roberta")


@pytest.fixture
def client(server):
    return server.client


def post(server, path, **body):
    return httpx.post(f"http://{server.address}{path}", json=body, timeout=60)


def lengths(vectors):
    return np.linalg.norm(np.asarray(vectors), axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_vectors_are_the_references(client, family, parity_embedding):
    reference = load_file(parity_embedding / family / "reference.safetensors")
    expected = np.stack([reference[f"vector.{number}"] for number in range(len(TEXTS))])
    embeddings = np.asarray(client.embed(family, TEXTS).embeddings)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    # Activations are rounded to int8, as ever on a CPU.
    assert np.sum(embeddings * expected, axis=1).min() > 0.99


def test_sixty_four_texts_come_back_in_their_order_as_alone(client):
    answer = client.embed("bert", BATCH)
    assert lengths(answer.embeddings) == pytest.approx(1, abs=1e-5)
    assert len({tuple(vector) for vector in answer.embeddings}) == 64
    for number in (0, 7, 63):
        assert client.embed("bert", BATCH[number]).embeddings == [answer.embeddings[number]]
    # Special tokens count.
    assert answer.prompt_eval_count == sum(client.embed("bert", text).prompt_eval_count for text in BATCH)
    assert answer.prompt_eval_count > 64 * 4
    assert answer.total_duration >= answer.load_duration > 0


def test_the_older_endpoint_answers_with_the_same_vector(server):
    answer = post(server, "/api/embeddings", model="bert", prompt="the fox").json()
    assert answer["embedding"] == pytest.approx(server.client.embed("bert", "the fox").embeddings[0], abs=1e-6)
    assert server.client.embeddings("bert", "the fox").embedding == answer["embedding"]


def test_the_openai_endpoint_answers_with_the_same_vectors(server):
    answer = post(server, "/v1/embeddings", model="bert", input=["the fox", "she sells"]).json()
    vectors = [entry["embedding"] for entry in answer["data"]]
    assert vectors == pytest.approx(np.asarray(server.client.embed("bert", ["the fox", "she sells"]).embeddings))


def test_the_command_line_prints_a_vector(server):
    printed = run_ollama(server, "run", "bert", "the fox")
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout) == pytest.approx(server.client.embed("bert", "the fox").embeddings[0])
    shorter = run_ollama(server, "run", "bert", "--dimensions", "8", "the fox")
    assert len(json.loads(shorter.stdout)) == 8
    refused = run_ollama(server, "run", "bert", "--truncate=false", LONG)
    assert refused.returncode == 1
    assert "the input length exceeds the context length" in refused.stderr


def test_dimensions_leave_the_first_values_at_length_one(client):
    whole = np.asarray(client.embed("bert", ["the fox", "she sells"]).embeddings)
    cut = np.asarray(client.embed("bert", ["the fox", "she sells"], dimensions=8).embeddings)
    assert cut == pytest.approx(whole[:, :8] / lengths(whole[:, :8])[:, None], abs=1e-6)
    assert np.asarray(client.embed("bert", "the fox", dimensions=1000).embeddings).shape == (1, whole.shape[1])


def test_a_longer_text_than_the_context_is_cut_where_it_may_be(client):
    answer = client.embed("bert", ["the fox", LONG])
    assert lengths(answer.embeddings) == pytest.approx(1, abs=1e-5)
    assert answer.prompt_eval_count <= 96 + 4


def test_a_longer_text_than_the_context_is_refused_where_it_may_not_be_cut(server):
    with pytest.raises(ollama.ResponseError, match=r"^the input length exceeds the context length") as refused:
        server.client.embed("bert", ["the fox", LONG], truncate=False)
    assert refused.value.status_code == 400
    answer = post(server, "/api/embeddings", model="bert", prompt=LONG)
    assert (answer.status_code, answer.json()) == (500, {"error": "the input length exceeds the context length"})
    with pytest.raises(ollama.ResponseError, match=r"^the input length exceeds the context length"):
        server.client.embed("bert", "the fox " * 10, truncate=False, options={"num_ctx": 8})


def test_nothing_to_embed_is_no_error(client):
    assert client.embed("bert", "").embeddings == []
    assert client.embed("bert", []).embeddings == []
    assert lengths(client.embed("bert", [""]).embeddings) == pytest.approx(1, abs=1e-5)


def test_models_of_the_other_kind_are_refused(client):
    with pytest.raises(ollama.ResponseError, match=r"^this model does not support embeddings") as refused:
        client.embed("tiny", "the fox")
    assert refused.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match='"bert" does not support generate'):
        client.generate("bert", "the fox")
    with pytest.raises(ollama.ResponseError, match='"bert" does not support chat'):
        client.chat("bert", [{"role": "user", "content": "the fox"}])


def test_an_embedding_model_is_known_as_one_and_unloads(start):
    with start() as server:
        assert server.client.show("bert").capabilities == ["embedding"]
        server.client.embed("bert", "the fox", keep_alive=60)
        child = server.child()
        assert [(model.model, model.context_length) for model in server.client.ps().models] == [("bert:latest", 96)]
        assert run_ollama(server, "stop", "bert").returncode == 0
        assert psutil.wait_procs([child], 10)[1] == []
