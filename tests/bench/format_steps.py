"""What a format costs a decoding step, in process: the same prompts and rows, with formats and without."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.grammar import JSONSchema, OutputFormat
from models.tokenizer import Tokenizer, load_tokenizer
from runner.engine.executors import OnnxChoice, Shape
from runner.engine.sequence import SequenceStatus
from runner.engine.text import TextEngine
from runner.engine.types import Failed, SamplingParams, TextChunk, TextRequest
from tests.bench.format_schemas import Case

CONTEXT, CHUNK = 1024, 64
ROWS = (1, 8)
GREEDY = SamplingParams(temperature=0)
FEWEST_STEPS = 24


class Engines:
    """One executor with an engine over it."""

    def __init__(self, model: Path, threads: int) -> None:
        checkpoint = open_checkpoint(str(model), Path())
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint)
        config = build_model(checkpoint.config)
        self.width = config.config.vocab_size
        choice = OnnxChoice("keep", "int8", "f16", threads=threads)
        executor = choice.load(checkpoint, config, Shape(max(ROWS), CONTEXT, CHUNK), lambda _: None)
        self.engine = TextEngine(
            executor, self.tokenizer, context_length=CONTEXT, parallel=max(ROWS), prefill_chunk=CHUNK
        )

    def _add(self, number: int, request: TextRequest) -> None:
        prepared = self.engine.prepare(request)
        if (completion := self.engine.completion(prepared)) is not None:
            completion()
        self.engine.add(number, prepared)

    def steps_s(self, requests: Sequence[TextRequest]) -> list[float]:
        """Seconds of each step in which all of the rows decode."""
        engine = self.engine
        for number, request in enumerate(requests):
            self._add(number, request)
        taken = []
        while not engine.idle:
            rows = engine._scheduler.running
            decoding = len(rows) == len(requests) and all(row.status is SequenceStatus.DECODE for row in rows)
            begin = time.perf_counter()
            engine.step()
            engine.proceed()
            if decoding:
                taken.append(time.perf_counter() - begin)
        return taken

    def answers(self, requests: Sequence[TextRequest]) -> list[str]:
        """The texts of all answers."""
        engine, texts = self.engine, [""] * len(requests)
        for number, request in enumerate(requests):
            self._add(number, request)
        while not engine.idle:
            for output in engine.step():
                if isinstance(output, Failed):
                    raise output.error
                if isinstance(output, TextChunk):
                    texts[output.id] += output.text
            engine.proceed()
        return texts


def request_of(case: Case, prompt: str, tokens: int) -> TextRequest:
    """A greedy request for an answer by a schema."""
    wanted = OutputFormat(JSONSchema(json.dumps(case.schema)))
    return TextRequest(prompt, GREEDY, num_predict=tokens, format=wanted)


def mask_seconds(case: Case, text: str) -> list[float]:
    """How long each mask takes along an answer."""
    assert case.compiled is not None
    matcher, taken = case.compiled.matcher(), []
    for token in case.compiled.tokens(text.rstrip("\ufffd").encode()) or ():
        begin = time.perf_counter()
        matcher.mask()
        taken.append(time.perf_counter() - begin)
        matcher.accept(token)
    return taken


def costs(engines: Engines, requests: Sequence[TextRequest], rounds: int) -> dict[int, list[tuple[float, float]]]:
    """By the number of rows, for each round the median step in seconds without formats and with them."""
    found: dict[int, list[tuple[float, float]]] = {}
    for rows in ROWS:
        for turn in range(rounds):
            chosen = [requests[(turn * rows + index) % len(requests)] for index in range(rows)]
            free = engines.steps_s([replace(each, format=None) for each in chosen])
            held = engines.steps_s(chosen)
            # Steps of the same lengths of context.
            shared = min(len(free), len(held))
            if shared >= FEWEST_STEPS:
                found.setdefault(rows, []).append((median(free[:shared]), median(held[:shared])))
    return found
