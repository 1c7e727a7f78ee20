"""Structured output through Ollama servers, the classic and the newest: by command line, HTTP and Python client."""

import json
from enum import StrEnum

import jsonschema
import pytest
from pydantic import BaseModel, Field

ollama = pytest.importorskip("ollama", reason="needs Ollama's Python client; `make test-ollama` installs it")
httpx = pytest.importorskip("httpx", reason="comes with Ollama's Python client")

from tests.ollama.programs import VERSIONS  # noqa: E402
from tests.ollama.server import run_ollama  # noqa: E402

# The parents between them drop `format` for these models.
pytestmark = [
    pytest.mark.ollama,
    pytest.mark.timeout(180),
    pytest.mark.parametrize("version", ["classic", "newest"], indirect=True, scope="module"),
]
OPTIONS = {"temperature": 0, "num_predict": 300}
QUESTION = "Tell me about the capital of France, as JSON."
MESSAGES = [{"role": "user", "content": QUESTION}]


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


class River(BaseModel):
    name: str = Field(max_length=20)
    length_km: int = Field(ge=0, le=7000)


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)
    size: Size
    rivers: list[River] = Field(min_length=1, max_length=2)
    note: str | None = Field(default=None, max_length=30)


@pytest.fixture
def client(server):
    return server.client


def test_a_pydantic_models_schema_is_obeyed(client):
    said = client.chat("smol", MESSAGES, format=City.model_json_schema(), options=OPTIONS).message.content
    city = City.model_validate_json(said)
    assert city.name
    parts = client.chat("smol", MESSAGES, format=City.model_json_schema(), options=OPTIONS, stream=True)
    assert "".join(part.message.content for part in parts) == said
    answer = client.generate("smol", QUESTION, format=City.model_json_schema(), options=OPTIONS)
    assert City.model_validate_json(answer.response)
    assert answer.done_reason == "stop"


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_obeyed_whatever_is_drawn(client, seed):
    options = {**OPTIONS, "temperature": 1.5, "seed": seed}
    pieces = list(client.generate("smol", QUESTION, format=City.model_json_schema(), options=options, stream=True))
    City.model_validate_json("".join(piece.response for piece in pieces))
    assert pieces[-1].done_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_json_alone_is_an_object_or_the_beginning_of_one(client, stream):
    said = client.generate("smol", QUESTION, format="json", options={**OPTIONS, "num_predict": 400}, stream=stream)
    pieces = list(said) if stream else [said]
    text = "".join(piece.response for piece in pieces)
    assert text.startswith("{")
    if pieces[-1].done_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_the_openai_endpoint_obeys_a_schema(server):
    schema = {**City.model_json_schema(), "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    body = {"model": "smol", "messages": MESSAGES, "max_tokens": 300, "temperature": 0, "response_format": wanted}
    answer = httpx.post(f"http://{server.address}/v1/chat/completions", json=body, timeout=60).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_a_thinking_models_thoughts_are_free(client):
    answer = client.chat("thinker", MESSAGES, think=True, format="json", options={**OPTIONS, "num_predict": 12})
    assert answer.message.thinking
    answer = client.chat("thinker", MESSAGES, think=False, format="json", options={**OPTIONS, "num_predict": 12})
    assert answer.message.content.startswith("{")


def test_a_schema_that_makes_no_sense_is_refused(client, version):
    classic = version == VERSIONS["classic"]
    # The classic parent makes a grammar first, and says itself when it cannot.
    reason, status = ("invalid JSON schema", 500) if classic else ("Invalid type: foo", 400)
    with pytest.raises(ollama.ResponseError, match=reason) as refused:
        client.generate("tiny", "the fox", format={"type": "foo"}, options=OPTIONS)
    assert refused.value.status_code == status
    assert client.generate("tiny", "the fox", options={"num_predict": 3}).eval_count == 3


def test_a_schema_that_nothing_satisfies_is_refused_in_the_runners_words(client):
    with pytest.raises(ollama.ResponseError, match=r"minimum .* greater than maximum") as refused:
        client.generate("tiny", "the fox", format={"type": "integer", "minimum": 5, "maximum": 1}, options=OPTIONS)
    assert refused.value.status_code == 400
    assert client.generate("tiny", "the fox", options={"num_predict": 3}).eval_count == 3


def test_the_command_line_takes_a_format(server):
    done = run_ollama(server, "run", "fish", "--format", "json", "the fox")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{"), "five tokens of an object"


def test_the_command_line_takes_a_schema(server):
    schema = City.model_json_schema()
    done = run_ollama(server, "run", "smol", "--nowordwrap", "--format", json.dumps(schema), QUESTION)
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), schema)
