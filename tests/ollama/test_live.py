"""The runner as the child of real Ollama servers, driven by Ollama's own Python client: what it answers."""

import re
import subprocess
from pathlib import Path

import pytest

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")
httpx = pytest.importorskip("httpx", reason="comes with Ollama's Python client")

from tests.ollama.programs import BIN, VERSIONS, skip_without  # noqa: E402

pytestmark = [pytest.mark.ollama, pytest.mark.timeout(180)]
GREEDY = {"temperature": 0, "num_predict": 12}
QUESTION = "Name the capital of France."


@pytest.fixture
def client(server):
    return server.client


def post(server, model, prompt, **body):
    """For fields that the client library does not know. The classic parent obeys `shift` and `truncate`."""
    body = {"model": model, "prompt": prompt, "stream": False, **body}
    return httpx.post(f"http://{server.address}/api/generate", json=body, timeout=60)


def test_a_question_is_answered(client):
    answer = client.generate("smol", QUESTION, options=GREEDY)
    assert "Paris" in answer.response
    assert answer.done_reason in ("stop", "length")
    assert answer.prompt_eval_count > 10
    assert answer.prompt_eval_duration > 0
    assert answer.eval_duration > 0
    assert len(answer.context) > answer.prompt_eval_count


def test_the_pieces_of_a_stream_are_the_answer(client):
    whole = client.generate("smol", QUESTION, options=GREEDY)
    pieces = list(client.generate("smol", QUESTION, options=GREEDY, stream=True))
    assert len(pieces) > 5
    assert "".join(piece.response for piece in pieces) == whole.response
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].eval_count == whole.eval_count


def test_a_conversation_goes_through_the_template(client):
    messages = [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Of which country is this the capital?"},
    ]
    answer = client.chat("smol", messages, options=GREEDY)
    assert "France" in answer.message.content
    assert answer.message.role == "assistant"
    shorter = client.chat("smol", messages[1:], options=GREEDY)
    assert shorter.prompt_eval_count < answer.prompt_eval_count
    streamed = "".join(part.message.content for part in client.chat("smol", messages, options=GREEDY, stream=True))
    assert streamed == answer.message.content


def test_a_models_own_system_prompt_and_parameters_count(client):
    alone = client.generate("fish", "the fox")
    assert alone.eval_count == 5
    assert client.generate("fish", "the fox").response == alone.response
    assert client.generate("fish", "the fox", system="be").prompt_eval_count < alone.prompt_eval_count
    assert client.generate("fish", "the fox", options={"num_predict": 3}).eval_count == 3


def test_a_template_in_the_request_replaces_the_models(client):
    answer = client.generate("tiny", "fox", template="{{ .Prompt }}", options=GREEDY)
    assert answer.prompt_eval_count == client.generate("tiny", "fox", raw=True, options=GREEDY).prompt_eval_count


def test_a_raw_prompt_is_left_alone(client):
    answer = client.generate("tiny", "fox", raw=True, options=GREEDY)
    assert answer.prompt_eval_count < 4
    assert not answer.context


def test_a_seed_reproduces_and_others_differ(client):
    def draw(seed):
        return client.generate("roomy", "the fox", options={"seed": seed, "num_predict": 12, "temperature": 1}).response

    assert draw(7) == draw(7)
    assert draw(0) == draw(0)
    assert len({draw(seed) for seed in range(5)}) > 3


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_narrow_sampling_is_greedy(client, narrow):
    greedy = client.generate("roomy", "the fox", options={"num_predict": 12, "temperature": 0})
    drawn = client.generate("roomy", "the fox", options={"num_predict": 12, "temperature": 2, "seed": 1, **narrow})
    assert drawn.response == greedy.response


@pytest.mark.parametrize("penalty", [{"repeat_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}])
def test_penalties_change_the_answer(client, penalty):
    options = {"num_predict": 60, "temperature": 0, "repeat_penalty": 1}
    plain = client.generate("roomy", "the fox", options=options)
    assert client.generate("roomy", "the fox", options={**options, **penalty}).response != plain.response


def test_a_stop_string_ends_the_answer_before_it(client):
    whole = client.generate("smol", QUESTION, options=GREEDY).response
    assert " capital" in whole
    answer = client.generate("smol", QUESTION, options={**GREEDY, "stop": ["nothing like it", " capital"]})
    assert answer.response == whole[: whole.index(" capital")]
    assert answer.done_reason == "stop"


def test_num_predict_limits_the_answer(client):
    answer = client.generate("roomy", "the fox", options={"num_predict": 4, "temperature": 0})
    assert (answer.eval_count, answer.done_reason) == (4, "length")


def test_an_answer_without_limit_ends_with_the_context(server):
    unlimited = {"num_predict": -1, "temperature": 0}
    answer = post(server, "tiny", "the fox", raw=True, shift=False, options=unlimited).json()
    assert answer["done_reason"] == "length"
    assert answer["prompt_eval_count"] + answer["eval_count"] in (128, 129)


def test_log_probabilities_come_with_their_alternatives(client):
    answer = client.generate("smol", QUESTION, options={**GREEDY, "num_predict": 3}, logprobs=True, top_logprobs=2)
    assert len(answer.logprobs) == 3
    for entry in answer.logprobs:
        assert entry.top_logprobs[0].token == entry.token
        assert 0 >= entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    assert "".join(entry.token for entry in answer.logprobs) == answer.response


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(server):
    answer = post(server, "tiny", "the fox " * 200, raw=True, truncate=False)
    assert answer.status_code == 400
    assert re.search(r"\d+ tokens.*128 tokens", answer.json()["error"])


def test_an_empty_prompt_is_refused(client):
    with pytest.raises(ollama.ResponseError, match="empty") as refused:
        client.generate("tiny", "the fox", template='{{ "" }}', options=GREEDY)
    assert refused.value.status_code == 400


def test_a_picture_for_a_text_model_is_refused_or_dropped(client, version):
    if version == VERSIONS["images"]:
        pytest.skip("this version's parent drops the picture before the runner sees it")
    picture = b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ollama.ResponseError, match="does not support image input"):
        client.generate("tiny", "fox", images=[picture], options=GREEDY)


def test_the_memory_and_the_context_of_a_running_model_are_true(client, version):
    client.generate("tiny", "fox", raw=True, options=GREEDY, keep_alive=60)
    (entry,) = [model for model in client.ps().models if model.model == "tiny:latest"]
    assert entry.context_length == 128
    assert 100_000 < entry.size < 10_000_000
    client.generate("smol", "fox", raw=True, options=GREEDY, keep_alive=60)
    (entry,) = [model for model in client.ps().models if model.model == "smol:latest"]
    classic = version == VERSIONS["classic"]
    # The classic parent reckons by itself, and has the weights in four bits.
    assert (100e6 if classic else 250e6) < entry.size < 2e9
    assert entry.size_vram == (0 if classic else entry.size)


def test_models_are_listed_and_shown(client):
    assert {model.model for model in client.list().models} >= {"tiny:latest", "fish:latest", "smol:latest"}
    shown = client.show("fish")
    assert shown.capabilities == ["completion"]
    assert "temperature" in shown.parameters


def test_ollamas_own_types_read_the_answers_as_recorded(version):
    skip_without(f"decode-{version}")
    answers = Path(__file__).parents[1] / "conformance" / "answers"
    recorded = {"classic": "classic.v0.24.jsonl", "images": "mlx.v0.33.jsonl", "newest": "mlx.v0.34.jsonl"}
    (recorded,) = (file for name, file in recorded.items() if VERSIONS[name] == version)
    with (answers / f"{recorded.partition('.')[0]}.jsonl").open("rb") as lines:
        decoded = subprocess.run([BIN / f"decode-{version}"], stdin=lines, capture_output=True, check=False)
    assert decoded.stdout == (answers / recorded).read_bytes()
    # The classic dialect has no error: its last line is one that no Go can read.
    assert (b"field CompletionResponse.done of type bool" in decoded.stderr) == (version == VERSIONS["classic"])
    assert decoded.returncode == (1 if decoded.stderr else 0)


def test_the_openai_endpoint_answers(server):
    body = {"model": "smol", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"http://{server.address}/v1/chat/completions", json=body, timeout=60).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 12


def test_the_newest_parent_tells_how_much_of_a_prompt_was_cached(server):
    if server.version != VERSIONS["newest"]:
        pytest.skip("older parents do not ask")
    answers = [post(server, "roomy", "there is no one here " * 90, options=GREEDY).json() for _ in range(2)]
    cached = [answer["prompt_eval_cached_count"] for answer in answers]
    assert 0 <= cached[0] < cached[1] < answers[1]["prompt_eval_count"]
    assert answers[0]["response"] == answers[1]["response"]


def test_a_thinking_models_text_reaches_the_parents_parser(client):
    answer = client.chat("thinker", [{"role": "user", "content": "the fox"}], think=True, options=GREEDY)
    assert answer.message.thinking
    assert not answer.message.content
    answer = client.chat("thinker", [{"role": "user", "content": "the fox"}], think=False, options=GREEDY)
    assert answer.message.content
    assert not answer.message.thinking
