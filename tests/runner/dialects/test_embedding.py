"""POST /embedding in each dialect, on the real loop and the real engine, with a model in miniature."""

import json
from contextlib import asynccontextmanager

import numpy as np
import pytest

from protocol.embedding import embedding_line
from runner.config import DialectName
from runner.engine.executor_thread import ExecutorThread
from runner.engine.loop import EngineLoop
from tests.fakes import POISON, FakeExecutor
from tests.fakes_embedding import FakeEmbeddingModel
from tests.fakes_wire import serve
from tests.runner.engine import serving
from tests.runner.engine.test_embedding import make_engine, vector

every_dialect = pytest.mark.parametrize("dialect", list(DialectName), ids=lambda dialect: dialect.value)


@asynccontextmanager
async def served_engine(dialect, make):
    thread = ExecutorThread()
    loop = EngineLoop(thread)
    try:
        await loop.load(lambda progress: make())
        async with serve(dialect, loop) as served:
            yield served
    finally:
        await loop.close(0)
        await thread.close()


@every_dialect
async def test_a_text_has_its_vector_and_count(dialect):
    async with served_engine(dialect, make_engine) as served:
        status, body = await served.post("/embedding", json={"content": "abc"})
        assert status == 200
        assert json.loads(body) == {"embedding": list(vector("abc")), "prompt_eval_count": 3}


@every_dialect
async def test_a_list_of_texts_has_a_list_of_vectors(dialect):
    async with served_engine(dialect, make_engine) as served:
        status, body = await served.post("/embedding", json={"content": ["abc", "de"]})
        assert status == 200
        assert json.loads(body) == {"embeddings": [list(vector("abc")), list(vector("de"))], "prompt_eval_count": 5}


@every_dialect
@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"content": "x" * 65}, 400, "the input length exceeds the context length"),
        ({"content": "x" * 9, "options": {"num_ctx": 8}}, 400, "the input length exceeds the context length"),
        ({"content": ""}, 500, "failed to create new sequence: no input provided"),
        ({}, 500, "failed to create new sequence: no input provided"),
        ({"content": []}, 400, "content has no texts"),
        ({"content": 7}, 400, "content must be a text or a list of texts"),
        ({"content": ["a", None]}, 400, "content must be a text or a list of texts"),
        ({"content": ["a"] * 2049}, 400, "content has 2049 texts; at most 2048 may come at once"),
        ({"content": "a", "dimensions": 5}, 400, "dimensions must be from 1 to 4, not 5"),
        ({"content": "a", "dimensions": -1}, 400, "dimensions must not be negative, but is -1"),
        ({"content": "a", "options": {"num_ctx": -1}}, 400, "num_ctx must not be negative, but is -1"),
        ({"content": "a", "truncate": True}, 501, "truncate is not supported"),
        ({"content": f"a{chr(POISON)}"}, 500, "the model's embedding has values that are not finite numbers"),
    ],
)
async def test_what_cannot_be_served_is_told_and_the_next_request_works(dialect, fields, status, reason):
    async with served_engine(dialect, make_engine) as served:
        told, body = await served.post("/embedding", json=fields)
        assert (told, body.decode().strip()[: len(reason)]) == (status, reason)
        assert (await served.post("/embedding", json={"content": "a"}))[0] == 200


@every_dialect
async def test_a_body_that_is_no_json_is_refused(dialect):
    async with served_engine(dialect, make_engine) as served:
        assert (await served.post("/embedding", data=b"{"))[0] == 400


@every_dialect
async def test_half_a_surrogate_pair_is_a_replacement_character_as_in_go(dialect):
    model = FakeEmbeddingModel()
    async with served_engine(dialect, lambda: make_engine(model)) as served:
        assert (await served.post("/embedding", data=b'{"content":"a\\ud800"}'))[0] == 200
        assert model.passes == [["a\ufffd".encode()]]


@every_dialect
async def test_an_embedding_model_says_no_words(dialect):
    async with served_engine(dialect, make_engine) as served:
        status, body = await served.post("/completion", json={"prompt": "a"})
        assert (status, body) == (501, b"the loaded model makes embeddings: ask it for them at /embedding\n")


@every_dialect
async def test_a_model_of_words_makes_no_embeddings(dialect):
    async with served_engine(dialect, lambda: serving.make_engine(FakeExecutor())) as served:
        status, body = await served.post("/embedding", json={"content": "a"})
        assert (status, body) == (501, b"this model does not support embeddings\n")


def test_a_line_keeps_every_bit_of_float32():
    drawn = np.random.default_rng(3).normal(size=500).astype(np.float32)
    values = np.concatenate([drawn, np.float32([0, -0.0, 1e-45, 3.4028235e38, 1 / 3])])
    line = embedding_line([values], 7, several=False)
    np.testing.assert_array_equal(np.array(json.loads(line)["embedding"], np.float32), values)
