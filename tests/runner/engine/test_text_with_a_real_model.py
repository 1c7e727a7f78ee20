"""The engine on real architectures with tiny weights: what pipelining, chunks, company and shifts must not change."""

from pathlib import Path

import mlx.core as mx
import pytest

from models.checkpoint import open_checkpoint
from models.llm import load_language_model
from models.llm.base import LanguageModel, Row
from models.tokenizer import load_tokenizer
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextRequest
from tests.fakes import EOS, ByteTokenizer

LIMIT, KEEP = 48, 4
TIE = 1e-3
"""Logits this close may change places by rounding."""


@pytest.fixture(scope="module", params=["llama_gqa", "mistral_window", "qwen3"])
def model(request: pytest.FixtureRequest, parity: Path) -> LanguageModel:
    return load_language_model(open_checkpoint(str(parity / request.param), store=parity))


def next_token(model: LanguageModel, tokens: list[int]) -> int:
    hidden = model(mx.array(tokens, dtype=mx.int32), [Row(len(tokens), model.new_cache())])
    return int(mx.argmax(model.logits(hidden[-1:])).item())


def by_heart(model: LanguageModel, prompt: str, count: int) -> list[int]:
    """Greedy decoding, every token from an empty cache."""
    tokens, said = list(prompt.encode()), []
    while len(said) < count and EOS not in said:
        said.append(next_token(model, tokens))
        tokens.append(said[-1])
        if len(tokens) >= LIMIT:
            del tokens[KEEP : KEEP + (LIMIT - KEEP) // 2]
    return said


@pytest.mark.parametrize("overlaps", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_rows_in_company_say_what_recomputing_says(model: LanguageModel, overlaps: bool):
    prompts = ["a", "some prompt that takes several chunks", "zyx", "one more to wait in the queue", "!" * 40]
    engine = TextEngine(model, ByteTokenizer(), context_length=LIMIT, parallel=3, prefill_chunk=5, overlaps=overlaps)
    rows, said = [], [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        request = TextRequest(prompt, SamplingParams(temperature=0), num_predict=60, num_keep=KEEP, shift=True)
        engine.add(number, engine.prepare(request))
        row = engine._rows[number]
        accept = row.accept
        row.accept = lambda token, logprob, number=number, accept=accept: said[number].append(token) or accept(token)
        rows.append(row)
        engine.step()
    while not engine.idle:
        engine.step()
    assert said == [by_heart(model, prompt, 60) for prompt in prompts]
    assert any(row.generated + row.prompt_len > LIMIT for row in rows), "no context was shifted"


STORY = "The old lighthouse stood on a rocky point, and every evening its keeper climbed the stairs. " * 12
COMPANY = [
    TextRequest("The capital of France is", SamplingParams(temperature=0), num_predict=40),
    TextRequest(STORY, SamplingParams(temperature=0), num_predict=30),
    TextRequest("Once upon a time", SamplingParams(temperature=0.8, seed=7), num_predict=40),
    TextRequest(STORY + "One day", SamplingParams(temperature=1.0, top_k=40, seed=8), num_predict=30),
    TextRequest("A list of colours:", SamplingParams(temperature=0.7, repeat_penalty=1.2, seed=9), num_predict=40),
    TextRequest("def add(a, b):", SamplingParams(temperature=0, frequency_penalty=0.5), num_predict=40),
]


@pytest.mark.model
def test_real_weights_say_in_company_what_they_say_alone(default_model: Path):
    """Rows join one after the other while others decode; long prompts come in chunks between their tokens."""
    checkpoint = open_checkpoint(str(default_model), default_model.parent)
    model, tokenizer = load_language_model(checkpoint, policy="float32"), load_tokenizer(checkpoint)

    def said(*requests: TextRequest) -> list[list[int]]:
        engine = TextEngine(model, tokenizer, context_length=1024, parallel=4, prefill_chunk=64)
        rows = []
        for number, request in enumerate(requests):
            engine.add(number, engine.prepare(request))
            rows.append(engine._rows[number])
            for _ in range(5):
                engine.step()
                engine.proceed()
        while not engine.idle:
            engine.step()
            engine.proceed()
        return [row.tokens for row in rows]

    alone = [said(request)[0] for request in COMPANY]
    for request, one, other in zip(COMPANY, alone, said(*COMPANY), strict=True):
        parted = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if parted is None:
            assert one == other
            continue
        assert request.sampling == SamplingParams(temperature=0), "a draw came out otherwise"
        tokens = mx.array(one[:parted], dtype=mx.int32)
        logits = model.logits(model(tokens, [Row(parted, model.new_cache())])[-1:])[0]
        assert abs(float(logits[one[parted]]) - float(logits[other[parted]])) < TIE
    assert len({tuple(tokens) for tokens in alone}) == len(COMPANY)
