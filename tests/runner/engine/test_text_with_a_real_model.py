"""The engine on real architectures: what running ahead, chunks, company and shifts must not change."""

from pathlib import Path

import numpy as np
import pytest

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.executors.base import Executor, Row, Step
from models.tokenizer import load_tokenizer
from runner.config import WeightChoice
from runner.engine.executors import OnnxChoice, Shape
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextRequest
from tests.fakes import EOS, ByteTokenizer
from tests.runner.engine.serving import real_executor, to_the_end

LIMIT, KEEP = 48, 4
PARALLEL = 3
SPARE = PARALLEL
"""A slot that no row of the engine has."""
REAL = [(name, kind) for name in ("llama_gqa", "mistral_window", "qwen3") for kind in ("onnx", "mlx", "mlx ahead")]


@pytest.fixture(scope="module", params=REAL, ids=" on ".join)
def executor(request: pytest.FixtureRequest, parity: Path) -> Executor:
    name, kind = request.param
    return real_executor(parity / name, kind, slots=PARALLEL + 1)


def next_token(executor: Executor, tokens: list[int]) -> int:
    executor.release(SPARE)
    logits = executor.forward(Step((Row(SPARE, 0, tuple(tokens)),)))
    assert logits is not None
    return int(np.argmax(logits.read()))


def by_heart(executor: Executor, prompt: str, count: int) -> list[int]:
    """Greedy decoding, every token from an empty slot."""
    tokens, said = list(prompt.encode()), []
    while len(said) < count and EOS not in said:
        said.append(next_token(executor, tokens))
        tokens.append(said[-1])
        if len(tokens) >= LIMIT:
            del tokens[KEEP : KEEP + (LIMIT - KEEP) // 2]
    return said


def test_rows_in_company_say_what_recomputing_says(executor: Executor):
    prompts = ["a", "some prompt that takes several chunks", "zyx", "one more to wait in the queue", "!" * 40]
    engine = TextEngine(executor, ByteTokenizer(), context_length=LIMIT, parallel=PARALLEL, prefill_chunk=5)
    rows, said = [], [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        request = TextRequest(prompt, SamplingParams(temperature=0), num_predict=60, num_keep=KEEP, shift=True)
        engine.add(number, engine.prepare(request))
        row = engine._rows[number]
        accept = row.accept
        row.accept = lambda token, logprob, number=number, accept=accept: said[number].append(token) or accept(token)
        rows.append(row)
        engine.step()
        engine.proceed()
    to_the_end(engine)
    assert said == [by_heart(executor, prompt, 60) for prompt in prompts]
    assert any(row.generated + row.prompt_len > LIMIT for row in rows), "no context was shifted"


STORY = "The old lighthouse stood on a rocky point, and every evening its keeper climbed the stairs. " * 4
COMPANY = [
    TextRequest("The capital of France is", SamplingParams(temperature=0), num_predict=16),
    TextRequest(STORY, SamplingParams(temperature=0), num_predict=12),
    TextRequest("Once upon a time", SamplingParams(temperature=0.8, seed=7), num_predict=16),
    TextRequest(STORY + "One day", SamplingParams(temperature=1.0, top_k=40, seed=8), num_predict=12),
    TextRequest("A list of colours:", SamplingParams(temperature=0.7, repeat_penalty=1.2, seed=9), num_predict=16),
    TextRequest("def add(a, b):", SamplingParams(temperature=0, frequency_penalty=0.5), num_predict=16),
]
ROWS, CONTEXT, CHUNK = 4, 1024, 64


@pytest.mark.model
@pytest.mark.parametrize("weights", ["keep", "float32"])
def test_real_weights_say_in_company_what_they_say_alone(default_model: Path, weights: WeightChoice):
    """Rows join one after the other while others decode; long prompts come in chunks between their tokens."""
    checkpoint = open_checkpoint(str(default_model), default_model.parent)
    model, tokenizer = build_model(checkpoint.config), load_tokenizer(checkpoint)
    choice = OnnxChoice(weights, "int8", "f16", threads=2)
    executor = choice.load(checkpoint, model, Shape(ROWS, CONTEXT, CHUNK), lambda _: None)

    def said(*requests: TextRequest) -> list[list[int]]:
        engine = TextEngine(executor, tokenizer, context_length=CONTEXT, parallel=ROWS, prefill_chunk=CHUNK)
        rows = []
        for number, request in enumerate(requests):
            engine.add(number, engine.prepare(request))
            rows.append(engine._rows[number])
            for _ in range(5):
                engine.step()
                engine.proceed()
        to_the_end(engine)
        return [row.tokens for row in rows]

    alone = [said(request)[0] for request in COMPANY]
    assert said(*COMPANY) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(COMPANY)
