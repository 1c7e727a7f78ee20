"""The engine on real architectures with tiny weights: what pipelining, chunks, company and shifts must not change."""

from pathlib import Path

import mlx.core as mx
import pytest

from models.checkpoint import open_checkpoint
from models.llm import load_language_model
from models.llm.base import LanguageModel, Row
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextRequest
from tests.fakes import EOS, ByteTokenizer

LIMIT, KEEP = 48, 4


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
