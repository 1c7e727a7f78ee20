import asyncio
import threading

import pytest

from models.executors.base import Step
from runner.engine import loop as loop_module
from runner.engine.executor_thread import ExecutorThread
from runner.engine.preparation import QUICK_CHARACTERS
from runner.engine.text import TextEngine
from runner.engine.types import EngineState, EngineStatus, Output, SamplingParams, TextChunk, TextRequest
from runner.errors import BadRequest, Busy, GenerationError, NotReady
from tests.fakes import FakeExecutor, Gate, scripted
from tests.runner.engine.conftest import Serve
from tests.runner.engine.serving import ENDLESS, LONG, Answer, ask, started


async def cancel(task: asyncio.Task[Answer]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- answers


async def test_an_answer_streams_piece_by_piece_and_ends_with_its_counts(serve: Serve):
    loop = await serve(FakeExecutor("Hello, world"))
    answer = await ask(loop, TextRequest(scripted(0)))
    assert answer.text == "Hello, world"
    assert (answer.done.prompt_tokens, answer.done.eval_tokens, answer.done.stop_token) == (1, 12, True)


async def test_requests_say_in_company_what_they_say_alone(serve: Serve, depth: int):
    loop = await serve(FakeExecutor(depth=depth), parallel=3)
    requests = [TextRequest(f"number {n}" * (n + 1), SamplingParams(seed=n), num_predict=30) for n in range(8)]
    alone = [(await ask(loop, request)).text for request in requests]
    company = [answer.text for answer in await asyncio.gather(*(ask(loop, request) for request in requests))]
    assert company == alone
    assert len(set(alone)) == len(alone)


async def test_a_wrong_prompt_is_refused_before_anything_is_queued(serve: Serve):
    loop = await serve(FakeExecutor("yes"))
    with pytest.raises(BadRequest):
        await ask(loop, TextRequest(""))
    assert (await ask(loop, TextRequest(scripted(0)))).text == "yes"


@pytest.mark.parametrize(("length", "quick"), [(QUICK_CHARACTERS, True), (QUICK_CHARACTERS + 1, False)])
async def test_what_is_prepared_in_no_time_is_not_handed_to_a_thread(
    serve: Serve, length: int, quick: bool, monkeypatch: pytest.MonkeyPatch
):
    loop = await serve(FakeExecutor("yes"), context_length=2000)
    prepare, threads = TextEngine.prepare, []
    monkeypatch.setattr(
        TextEngine,
        "prepare",
        lambda engine, request: threads.append(threading.current_thread()) or prepare(engine, request),
    )
    await ask(loop, TextRequest("x" * length, num_predict=1))
    assert (threads == [threading.main_thread()]) is quick


async def test_a_full_queue_is_busy_and_room_again_is_not(serve: Serve):
    gate = Gate(0)
    loop = await serve(FakeExecutor("yes", before_step=gate), parallel=1, max_waiting=1)
    tasks = [await started(loop, TextRequest(scripted(0))) for _ in range(2)]
    with pytest.raises(Busy):
        await ask(loop, TextRequest(scripted(0)))
    gate.open()
    assert [(await task).text for task in tasks] == ["yes", "yes"]
    assert (await ask(loop, TextRequest(scripted(0)))).text == "yes"


async def test_text_can_be_tokenized_while_a_step_runs(serve: Serve):
    gate = Gate(0)
    loop = await serve(FakeExecutor("yes", before_step=gate), adds_bos=True)
    task = await started(loop, TextRequest(scripted(0)))
    await gate.reached()
    assert await loop.tokenize("ab", add_bos=False) == [97, 98]
    assert len(await loop.tokenize("ab", add_bos=True)) == 3
    gate.open()
    await task


async def test_a_token_is_handed_over_before_the_next_step_is_begun(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    go_on = threading.Event()
    loop = await serve(FakeExecutor("yes"))
    monkeypatch.setattr(TextEngine, "proceed", lambda self: go_on.wait(60))
    async with loop.submit(TextRequest(scripted(0))) as outputs:
        assert (await anext(outputs)).text == "y"
        assert loop.status.running == 1
        go_on.set()
        assert "".join([output.text async for output in outputs if isinstance(output, TextChunk)]) == "es"


async def test_what_raises_once_the_tokens_are_told_costs_nobody_his_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
):
    loop = await serve(FakeExecutor("yes"))
    with monkeypatch.context() as patch:
        patch.setattr(TextEngine, "proceed", lambda self: 1 / 0)
        assert (await ask(loop, TextRequest(scripted(0)))).text == "yes"
    assert (await ask(loop, TextRequest(scripted(0)))).text == "yes"


# --- cancellation


async def test_a_request_cancelled_in_the_queue_is_never_run(serve: Serve):
    gate = Gate(1)
    lengths = []

    def note(number, step):
        lengths.append([row.length for row in step.rows])
        gate(number, step)

    loop = await serve(FakeExecutor("first", "third", before_step=note), parallel=1)
    first = await started(loop, TextRequest(scripted(0)))
    await gate.reached()
    second = await started(loop, TextRequest("seven.." * 2))
    third = await started(loop, TextRequest(scripted(1, "abc")))
    await cancel(second)
    gate.open()
    assert (await first).text == "first"
    assert (await third).text == "third"
    assert [14] not in lengths


async def test_a_request_cancelled_in_prefill_stops_within_one_step(serve: Serve):
    gate = Gate(2)
    executor = FakeExecutor("next", before_step=gate)
    loop = await serve(executor, parallel=1)
    task = await started(loop, TextRequest(LONG))
    await gate.reached()
    await cancel(task)
    gate.open()
    assert (await ask(loop, TextRequest(scripted(0)))).text == "next"
    # Three chunks of the long prompt, then one prompt and four steps that yield the rest of "next" and its end.
    assert executor.steps == 3 + 1 + 4


async def test_a_request_cancelled_in_decode_stops_within_one_step_and_its_memory_returns(
    serve: Serve, thread: ExecutorThread, depth: int
):
    gate = Gate(5)
    executor = FakeExecutor(ENDLESS, "next", before_step=gate, depth=depth)
    loop = await serve(executor, parallel=2)
    task = await started(loop, TextRequest(scripted(0)))
    await gate.reached()
    await cancel(task)
    gate.open()
    assert (await ask(loop, TextRequest(scripted(1)))).text == "next"
    assert executor.steps <= 6 + 1 + 5
    assert (loop.status.running, loop.status.waiting) == (0, 0)
    # Slots are let go once the tokens are told.
    assert await thread.call(executor.living_slots) == 0


async def test_leaving_the_reader_early_cancels_the_request(serve: Serve, depth: int):
    executor = FakeExecutor(ENDLESS, "next", depth=depth)
    loop = await serve(executor, parallel=1, context_length=2 * len(ENDLESS))
    async with loop.submit(TextRequest(scripted(0))) as outputs:
        first = await anext(outputs)
        assert isinstance(first, TextChunk)
    assert (await ask(loop, TextRequest(scripted(1)))).text == "next"
    assert executor.steps < len(ENDLESS)


async def test_a_request_cancelled_before_its_first_tick_is_not_started(serve: Serve):
    executor = FakeExecutor("yes")
    loop = await serve(executor)
    async with loop.submit(TextRequest(scripted(0))):
        pass
    assert (await ask(loop, TextRequest(scripted(0)))).done.eval_tokens == 3
    # The prompt, and three letters.
    assert executor.steps == 1 + 3


# --- failures


async def test_a_step_that_raises_fails_its_rows_and_serving_goes_on(serve: Serve, depth: int):
    gate = Gate(1)

    def fail(number, step):
        gate(number, step)
        if number == 5:
            raise MemoryError("no room for this step")

    loop = await serve(FakeExecutor("first answer", "next", before_step=fail, depth=depth), parallel=2)
    running = [await started(loop, TextRequest(scripted(0))) for _ in range(2)]
    waiting = await started(loop, TextRequest(scripted(1)))
    gate.open()
    for task in running:
        error = (await task).error
        assert isinstance(error, GenerationError)
        assert "no room for this step" in str(error)
        assert error.__traceback__ is None
    assert (await waiting).text == "next"
    assert loop.status.state is EngineState.READY


async def test_a_row_whose_logits_are_not_numbers_fails_alone(serve: Serve, depth: int):
    loop = await serve(FakeExecutor("fine", depth=depth))
    bad = await started(loop, TextRequest("oh\x0e"))
    good = await started(loop, TextRequest(scripted(0)))
    assert isinstance((await bad).error, GenerationError)
    assert (await good).text == "fine"


async def test_a_reader_that_lags_is_failed_and_holds_nobody_up(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop_module, "MAX_PENDING", 20)
    loop = await serve(FakeExecutor(ENDLESS, "next"), parallel=1, context_length=4096)
    async with loop.submit(TextRequest(scripted(0))) as outputs:
        # Served behind the one that nobody reads, so that one was cut off by then.
        assert (await ask(loop, TextRequest(scripted(1)))).text == "next"
        lagging = Answer([output async for output in outputs])
    assert "not read fast enough" in str(lagging.error)
    assert ENDLESS.startswith(lagging.text)
    assert len(lagging.text) == 21


async def test_chunks_that_wait_are_handed_over_as_one(serve: Serve):
    loop = await serve(FakeExecutor("all at once", "x"), parallel=1)
    async with loop.submit(TextRequest(scripted(0))) as outputs:
        await ask(loop, TextRequest(scripted(1)))
        lagging = Answer([output async for output in outputs])
    assert lagging.pieces == ["all at once"]


async def test_a_flood_of_prompts_does_not_starve_a_decoding_row(serve: Serve, depth: int):
    gate, batches = Gate(1), []

    def note(number, step):
        batches.append([(row.slot, row.length) for row in step.rows])
        gate(number, step)

    loop = await serve(FakeExecutor("steady", before_step=note, depth=depth), parallel=4)
    steady = await started(loop, TextRequest(scripted(0)))
    flood = [await started(loop, TextRequest(LONG, num_predict=1)) for _ in range(12)]
    gate.open()
    assert (await steady).text == "steady"
    row = (batches[0][0][0], 1)
    assert [row in batch for batch in batches[:7]] == [True] * 7
    assert [(len(batch), batch[1][1]) for batch in batches[2:7]] == [(2, 16)] * 5, "one chunk a step beside it"
    for answer in await asyncio.gather(*flood):
        assert answer.done.prompt_tokens == len(LONG)


async def test_a_request_the_engine_lost_is_failed(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    def lose(self, request_id, prepared):
        raise KeyError("lost")

    loop = await serve(FakeExecutor("yes"))
    with monkeypatch.context() as patch:
        patch.setattr(TextEngine, "add", lose)
        assert isinstance((await ask(loop, TextRequest(scripted(0)))).error, GenerationError)
    assert (await ask(loop, TextRequest(scripted(0)))).text == "yes"


async def test_if_the_loop_itself_fails_nobody_waits_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    def broken(self):
        raise KeyError("a mistake of ours")

    loop = await serve(FakeExecutor("yes"))
    monkeypatch.setattr(TextEngine, "status", broken)
    assert "a mistake of ours" in str((await ask(loop, TextRequest(scripted(0)))).error)
    assert loop.status.state is EngineState.ERROR
    with pytest.raises(NotReady, match="a mistake of ours"):
        await ask(loop, TextRequest(scripted(0)))


# --- status


async def test_the_status_answers_while_a_step_runs(serve: Serve):
    gate = Gate(2)
    loop = await serve(FakeExecutor("yes", before_step=gate), parallel=1)
    tasks = [await started(loop, TextRequest(scripted(0))) for _ in range(3)]
    await gate.reached()
    assert loop.status.state is EngineState.READY
    assert loop.status.context_length == 256
    assert loop.status.running == 1
    gate.open()
    await asyncio.gather(*tasks)
    assert (loop.status.running, loop.status.waiting) == (0, 0)


async def test_an_idle_loop_does_not_tick(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    loop = await serve(FakeExecutor("yes"))
    await ask(loop, TextRequest(scripted(0)))
    ticks = []
    monkeypatch.setattr(loop_module, "tick", lambda *args: ticks.append(args))
    for _ in range(5):
        await asyncio.sleep(0)
    assert ticks == []


class Countdown:
    """An engine with so many steps to do."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def idle(self) -> bool:
        return self.left == 0

    def step(self) -> list[Output]:
        self.left -= 1
        return []

    def status(self) -> EngineStatus:
        return EngineStatus()

    def proceed(self) -> None:
        pass


@pytest.mark.parametrize(("news_after", "left"), [(10, 0), (1, 4), (3, 2)])
def test_the_executors_thread_steps_on_until_it_is_idle_or_there_is_news(news_after: int, left: int):
    engine, emitted = Countdown(5), []
    run = loop_module.run
    run(engine, {}, [], lambda *said: emitted.append(said), lambda: len(emitted) >= news_after)
    assert engine.left == left
    assert len(emitted) == 5 - left


async def test_who_comes_while_others_run_joins_at_the_next_step(serve: Serve, depth: int):
    gate, later = Gate(3), Gate(20)

    def before_step(number: int, step: Step) -> None:
        gate(number, step)
        later(number, step)

    loop = await serve(FakeExecutor(ENDLESS, before_step=before_step, depth=depth), parallel=2)
    first = await started(loop, TextRequest(scripted(0)))
    await gate.reached()
    second = await started(loop, TextRequest(scripted(0), num_predict=2))
    gate.open()
    await later.reached()
    assert (await second).done.eval_tokens == 2
    assert not first.done()
    later.open()
    await cancel(first)
