"""Who may run when memory is short: the decision as numbers, and what the engine makes of it."""

from collections.abc import Callable

import pytest

from models.executors.base import Step
from runner.engine import admission as module
from runner.engine.admission import Admission, Decision, Memory, Usage, Verdict, decide, planned_tokens
from runner.engine.executor_thread import ExecutorThread
from runner.engine.loop import EngineLoop
from runner.engine.prefix_cache import PrefixCache
from runner.engine.sequence import PreparedText
from runner.engine.text import TextEngine
from runner.engine.types import Failed, SamplingParams, TextDone, TextRequest
from runner.errors import InsufficientMemory, status_of
from tests.fakes import BYTES_PER_TOKEN, FakeExecutor
from tests.runner.engine.serving import answer, make_engine, run, to_the_end

GREEDY = SamplingParams(temperature=0)
MIB = 1 << 20


def megabytes(**figures: int) -> Memory:
    return Memory(**{name: count * MIB for name, count in figures.items()})


@pytest.mark.parametrize(
    ("needed", "memory", "expected"),
    [
        (100, megabytes(free=100), Decision(Verdict.ADMIT)),
        (101, megabytes(free=100), Decision(Verdict.REFUSE)),
        # The prefix cache gives up what is missing and no more.
        (101, megabytes(free=100, stored=50), Decision(Verdict.ADMIT, MIB)),
        (150, megabytes(free=100, stored=50), Decision(Verdict.ADMIT, 50 * MIB)),
        (151, megabytes(free=100, stored=50), Decision(Verdict.REFUSE)),
        # What running rows will still take is as good as taken.
        (100, megabytes(free=150, held=10, promised=50), Decision(Verdict.ADMIT)),
        (100, megabytes(free=150, held=10, promised=51), Decision(Verdict.WAIT)),
        (100, megabytes(free=150, held=10, promised=51, stored=1), Decision(Verdict.ADMIT, MIB)),
        (100, megabytes(free=0, held=100), Decision(Verdict.WAIT)),
        (101, megabytes(free=0, held=100), Decision(Verdict.REFUSE)),
        # A step's working space is kept free as long as somebody runs, and risked for one alone.
        (100, megabytes(free=120, working=30, held=50), Decision(Verdict.WAIT)),
        (100, megabytes(free=120, working=30), Decision(Verdict.ADMIT)),
        (100, megabytes(free=120, working=30, stored=5), Decision(Verdict.ADMIT, 5 * MIB)),
        # Little is dared whatever the figures say, but not beside others.
        (64, megabytes(free=0), Decision(Verdict.ADMIT)),
        (64, megabytes(free=0, held=1), Decision(Verdict.WAIT)),
        (65, megabytes(free=0), Decision(Verdict.REFUSE)),
    ],
)
def test_a_row_runs_waits_or_is_refused_by_the_figures(needed: int, memory: Memory, expected: Decision):
    assert decide(needed * MIB, memory) == expected


def prepared(prompt: int, *, num_predict: int | None, limit: int) -> PreparedText:
    request = TextRequest("x" * prompt, num_predict=num_predict)
    return make_engine(FakeExecutor(), context_length=limit).prepare(request)


@pytest.mark.parametrize(
    ("prompt", "num_predict", "limit", "planned"),
    [
        (100, 50, 1000, 150),
        # Without a bound: a quarter of what is left, within bounds, and never more than fits.
        (100, None, 4100, 1100),
        (100, None, 200_000, 100 + 2048),
        (100, None, 500, 100 + 256),
        (100, None, 150, 150),
        # A bound beyond the context is none.
        (100, 100_000, 4100, 1100),
    ],
)
def test_an_answer_is_planned_by_its_bound_or_a_share_of_what_is_left(prompt, num_predict, limit, planned):
    assert planned_tokens(prepared(prompt, num_predict=num_predict, limit=limit)) == planned


@pytest.fixture(autouse=True)
def _nothing_is_negligible(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "needed" not in request.fixturenames:
        monkeypatch.setattr(module, "NEGLIGIBLE_BYTES", 0)


class Machine:
    """A machine of so many tokens' memory, with an engine on it."""

    def __init__(self, tokens: int, *, depth: int = 0, cache_bytes: int = 0) -> None:
        self.tokens = tokens
        self.most_running = 0
        self.executor = FakeExecutor(depth=depth, before_step=self._look)
        self.prefixes = PrefixCache(self.executor, cache_bytes) if cache_bytes else None
        self.least_free = tokens
        self.engine: TextEngine = make_engine(
            self.executor,
            context_length=1000,
            prefix_cache=self.prefixes,
            admission=Admission(
                self.executor.state_nbytes, self.free, working_bytes=0, give_back=self.executor.give_back
            ),
        )

    def free(self) -> int:
        stored = 0 if self.prefixes is None else self.prefixes.nbytes
        return BYTES_PER_TOKEN * self.tokens - self.executor.memory_bytes() - stored

    def _look(self, _number: int, step: Step) -> None:
        self.least_free = min(self.least_free, self.free())
        self.most_running = max(self.most_running, len(step.rows))


def request(prompt: str, count: int = 20) -> TextRequest:
    return TextRequest(prompt, GREEDY, num_predict=count)


def test_rows_that_do_not_fit_together_run_one_after_the_other_and_say_the_same(depth: int):
    machine = Machine(250, depth=depth)
    requests = [request(letter * 100) for letter in "abcd"]
    answers = run(machine.engine, *requests)
    assert [got.text for got in answers] == [answer(FakeExecutor(), one, context_length=1000).text for one in requests]
    assert machine.most_running == 2
    assert machine.least_free >= 0


def test_nobody_overtakes_a_row_that_waits_for_memory():
    machine = Machine(250)
    engine = machine.engine
    for number, one in enumerate([request("a" * 150), request("b" * 200), request("c" * 10)]):
        engine.add(number, engine.prepare(one))
    ended = []
    while not engine.idle:
        ended += [output.id for output in engine.step() if isinstance(output, TextDone)]
        engine.proceed()
    assert ended[0] == 0
    assert machine.most_running == 2, "the last two fit together"


def test_the_prefix_cache_makes_room_before_anybody_waits():
    machine = Machine(400, cache_bytes=1 << 20)
    run(machine.engine, request("a" * 200))
    run(machine.engine, request("b" * 100))
    held = machine.prefixes.nbytes
    assert held >= BYTES_PER_TOKEN * 300
    run(machine.engine, request("c" * 180))
    assert machine.least_free >= 0
    assert machine.executor.given_back == 1
    (again,) = run(machine.engine, request("b" * 100 + "!"))
    assert again.done.cached_tokens > 0, "more was given up than needed"


def test_what_can_never_fit_is_refused_before_it_is_queued_with_figures_and_a_remedy():
    machine = Machine(250)
    with pytest.raises(InsufficientMemory, match=r"^insufficient memory: a prompt of 300 tokens .* GiB .*num_predict"):
        machine.engine.prepare(request("x" * 300))
    assert machine.executor.given_back == 1
    assert machine.engine.prepare(request("x" * 200))


def test_what_fits_only_once_others_have_ended_is_not_refused():
    machine = Machine(250)
    machine.engine.add(1, machine.engine.prepare(request("a" * 200)))
    for _ in range(14):
        machine.engine.step()
        machine.engine.proceed()
    assert machine.free() < BYTES_PER_TOKEN * 220
    assert machine.engine.prepare(request("b" * 200))


def test_a_row_that_was_cancelled_is_put_away_before_another_is_judged():
    machine = Machine(250, cache_bytes=1 << 20)
    machine.engine.add(1, machine.engine.prepare(request("a" * 200)))
    machine.engine.step()
    machine.engine.proceed()
    machine.engine.cancel(1)
    machine.engine.add(2, machine.engine.prepare(request("b" * 200)))
    assert isinstance(to_the_end(machine.engine)[-1], TextDone)


def test_a_request_is_judged_by_what_was_last_published_whatever_the_engine_does_meanwhile():
    machine = Machine(1000)
    engine = machine.engine
    engine.add(1, engine.prepare(request("a" * 200)))
    for _ in range(14):
        engine.step()
        engine.proceed()
    published = engine._usage
    assert published == Usage(rows=((201, 220),))
    engine.step()
    assert engine._usage is published
    machine.tokens = 250
    assert engine.prepare(request("b" * 200)), "the row that runs will give its memory back"
    engine.cancel(1)
    engine.proceed()
    assert engine._usage == Usage()


def test_memory_that_went_away_while_a_row_waited_fails_that_row_alone():
    machine = Machine(1000)
    engine = machine.engine
    for number, one in enumerate([request("a" * 500), request("b" * 600), request("c" * 20)]):
        engine.add(number, engine.prepare(one))
    ends = {}
    while not engine.idle:
        for output in engine.step():
            if isinstance(output, TextDone | Failed):
                ends[output.id] = output
                machine.tokens = 300
        engine.proceed()
    assert isinstance(ends[0], TextDone)
    assert isinstance(ends[1], Failed)
    assert str(ends[1].error).startswith("insufficient memory: a prompt of 600 tokens")
    assert isinstance(ends[2], TextDone)


async def test_a_refusal_is_a_status_before_any_header():
    thread = ExecutorThread()
    loop = EngineLoop(thread)
    build: Callable[..., TextEngine] = lambda _: Machine(100).engine  # noqa: E731
    await loop.load(build)
    with pytest.raises(InsufficientMemory) as refused:
        async with loop.submit(request("x" * 300)):
            pass
    assert status_of(refused.value) == 500
    await loop.close(0)
    await thread.close()
