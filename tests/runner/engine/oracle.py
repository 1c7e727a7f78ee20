"""An oracle in a drafter's place, engines that listen to it, and what drafting must not change."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from runner.engine.drafting import Drafter
from runner.engine.sequence import Sequence as TextRow
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextRequest
from tests.fakes import POISON, FakeExecutor
from tests.runner.engine.serving import GREEDY, Answer, make_engine, to_the_end

DRAFT = 5
KINDS = [
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=0, top_p=0.5),
    SamplingParams(seed=3, top_k=0, top_p=0, min_p=0.2, temperature=2.0),
    SamplingParams(seed=4, typical_p=0.5, repeat_penalty=1.3),
    SamplingParams(seed=5, presence_penalty=1.0, frequency_penalty=0.5, repeat_last_n=-1),
    SamplingParams(seed=6, repeat_penalty=1.8, repeat_last_n=4, temperature=1.5),
    SamplingParams(temperature=0, repeat_penalty=1.5, repeat_last_n=8),
    SamplingParams(temperature=0, frequency_penalty=2.0),
]


class Oracle:
    """Knows what rows will say, and lies at some places."""

    def __init__(self, said: Sequence[Sequence[int]], lies: Callable[[int], bool]) -> None:
        self._follows = {
            tuple(tokens[place - 6 : place]): (tokens, place) for tokens in said for place in range(6, len(tokens))
        }
        self._lies = lies

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        stream, place = self._follows.get(tuple(tokens[-6:]), ((), 0))
        known = enumerate(stream[place : place + limit], place)
        return [token ^ 1 if self._lies(place) else token for place, token in known]

    def observe(self, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed <= DRAFT


LIES: dict[str, Callable[[int], bool]] = {
    "never": lambda place: False,
    "now and then": lambda place: place % 4 == 3,
    "always": lambda place: True,
}


class Poisoner:
    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        return [POISON] * limit

    def observe(self, proposed: int, accepted: int) -> None:
        assert accepted == 0


def watch(row: TextRow, said: list[int]) -> None:
    """Note each token that a row accepts."""
    accept = row.accept

    def noting(token, logprob):
        said.append(token)
        return accept(token, logprob)

    row.accept = noting


def streams(engine: TextEngine, *requests: TextRequest) -> list[list[int]]:
    """What each row holds and says in the end, prompts included."""
    said: list[list[int]] = []
    for number, request in enumerate(requests):
        engine.add(number, engine.prepare(request))
        row = engine._rows[number]
        said.append(list(row.tokens))
        watch(row, said[-1])
    to_the_end(engine)
    return said


def drafting_engine(executor: FakeExecutor, **options) -> TextEngine:
    """An engine that drafts from the first step on, for it believes to know what a step costs."""
    return measured(make_engine(executor, **({"draft": DRAFT} | options)))


def measured(engine: TextEngine) -> TextEngine:
    for rows in range(1, 5):
        for _ in range(3):
            engine._costs.observe(rows, 1e-6)
    return engine


def oracle(engine: TextEngine, requests: Sequence[TextRequest], lies: str) -> Callable[[], Drafter]:
    said = streams(engine, *requests)
    return lambda: Oracle(said, LIES[lies])


NO_COUNTS = {"id": 0, "prompt_ns": 0, "eval_ns": 0, "drafted_tokens": 0, "accepted_tokens": 0, "cached_tokens": 0}


def assert_same(drafted: Sequence[Answer], plain: Sequence[Answer]) -> None:
    """All that a client sees is the same."""
    for one, other in zip(drafted, plain, strict=True):
        assert one.text == other.text
        assert one.logprobs == other.logprobs
        assert replace(one.done, **NO_COUNTS) == replace(other.done, **NO_COUNTS)
