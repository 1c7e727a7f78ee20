"""Requests of every kind, served by an engine: what two executors of one model are to answer alike."""

from pathlib import Path

from models.checkpoint import open_checkpoint
from models.executors.base import Executor
from models.grammar.formats import GBNF, OutputFormat
from models.tokenizer import load_tokenizer
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextDone, TextRequest
from tests.runner.engine.serving import admit, run

GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=0.9, seed=7, repeat_penalty=1.2)
ONE_OF = GBNF('root ::= "yes" | "no" | "maybe"')
REPEATING = "abcabcabcabcabcabc"
REQUESTS = {
    "greedy": TextRequest("once upon a time there was a house by the sea", GREEDY, 16),
    "seeded": TextRequest("to be or not to be", SEEDED, 16),
    "drafted": TextRequest(REPEATING, GREEDY, 24, draft=4),
    "formatted": TextRequest("shall I?", SEEDED, 16, format=OutputFormat(ONE_OF)),
    "told": TextRequest("a", GREEDY, 4, logprobs=True, top_logprobs=3),
    "shifted": TextRequest("the quick brown fox jumps over", GREEDY, 40, num_ctx=48, shift=True),
}


def answers(executor: Executor, folder: Path) -> dict[str, list[object]]:
    """Each request alone, again from what it left, all at once, and one behind those who left."""
    checkpoint = open_checkpoint(str(folder), folder)
    engine = TextEngine(
        executor,
        load_tokenizer(checkpoint),
        context_length=96,
        parallel=4,
        prefill_chunk=16,
        prefix_cache=PrefixCache(executor, 1 << 20),
        draft=4,
    )
    found: dict[str, list[object]] = {}
    for name, request in REQUESTS.items():
        found[name] = [_told(engine, request)]
    for name, request in REQUESTS.items():
        found[name].append(_told(engine, request))
    found["together"] = [answer.text for answer in run(engine, *REQUESTS.values())]
    for number in range(100, 108):
        admit(engine, number, REQUESTS["greedy"])
        for _ in range(number % 4):
            engine.step()
            engine.proceed()
        engine.cancel(number)
    found["behind"] = [_told(engine, REQUESTS["greedy"])]
    engine.close()
    return found


def _told(engine: TextEngine, request: TextRequest) -> list[object]:
    """The text, the log-probabilities to the third digit, and how much of the prompt was there."""
    (answer,) = run(engine, request)
    assert isinstance(answer.end, TextDone), answer.end
    return [answer.text, [round(each.logprob, 3) for each in answer.logprobs], answer.done.cached_tokens]
