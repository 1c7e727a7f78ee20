import time

import pytest

from models.executors.base import Step
from runner.engine.scheduler import MIN_CHUNK
from runner.engine.text import TextEngine
from runner.engine.types import Failed, Output, TextRequest
from runner.errors import GenerationError
from tests.fakes import FakeExecutor, scripted
from tests.runner.engine.serving import GREEDY, Answer, make_engine, run, to_the_end


def ticks(engine: TextEngine, count: int) -> list[Output]:
    outputs = []
    for _ in range(count):
        outputs += engine.step()
        engine.proceed()
    return outputs


def test_a_step_that_raises_says_what_was_said_before_and_fails_its_rows_only(depth: int):
    def fail(number: int, step: Step) -> None:
        if number == 4:
            raise ValueError("a bad step")

    executor = FakeExecutor("abcdefgh", "fine", depth=depth, before_step=fail)
    engine = make_engine(executor, parallel=1)
    engine.add(1, engine.prepare(TextRequest(scripted(0))))
    engine.add(2, engine.prepare(TextRequest(scripted(1))))
    outputs = ticks(engine, 4 - depth)
    with pytest.raises(ValueError, match="a bad step"):
        engine.step()
    outputs += engine.abandon(ValueError("a bad step"))
    assert "".join(output.text for output in outputs[:-1]) == "abcd"[: 4 - depth]
    assert isinstance(outputs[-1], Failed)
    assert isinstance(outputs[-1].error, GenerationError)
    assert {output.id for output in outputs} == {1}
    assert executor.living_slots() == 0
    assert Answer(to_the_end(engine)).text == "fine"


def test_a_step_that_turns_out_bad_when_it_is_read_takes_the_one_behind_it_along():
    reads = []

    def fail() -> None:
        reads.append(None)
        if len(reads) == 3:
            raise ValueError("a bad step")

    executor = FakeExecutor("abcdefgh", "fine", depth=1, before_read=fail)
    engine = make_engine(executor, parallel=1)
    engine.add(1, engine.prepare(TextRequest(scripted(0))))
    engine.add(2, engine.prepare(TextRequest(scripted(1))))
    with pytest.raises(ValueError, match="a bad step"):
        ticks(engine, 3)
    (failed,) = engine.abandon(ValueError("a bad step"))
    assert isinstance(failed, Failed)
    assert (failed.id, executor.living_slots(), executor.living_steps()) == (1, 0, 0)
    assert Answer(to_the_end(engine)).text == "fine"


@pytest.mark.parametrize("waiting", [1, 3])
def test_a_slot_that_cannot_be_filled_fails_only_the_row_it_was_for(
    depth: int, waiting: int, monkeypatch: pytest.MonkeyPatch
):
    executor = FakeExecutor("first", depth=depth)
    engine = make_engine(executor)
    engine.add(0, engine.prepare(TextRequest(scripted(0))))
    outputs: dict[int, list[Output]] = {number: [] for number in range(waiting + 1)}

    def note(told: list[Output]) -> None:
        for output in told:
            outputs[output.id].append(output)

    note(ticks(engine, 1))
    with monkeypatch.context() as patch:
        patch.setattr(engine._store, "fill", lambda row, chunk: 1 / 0)
        for number in range(1, waiting + 1):
            engine.add(number, engine.prepare(TextRequest(scripted(0))))
        with pytest.raises(ZeroDivisionError):
            engine.step()
        failed = engine.abandon(ZeroDivisionError())
    assert [output.id for output in failed] == [1]
    note(failed)
    note(to_the_end(engine))
    assert [Answer(outputs[number]).text for number in outputs if number != 1] == ["first"] * waiting


@pytest.mark.parametrize(
    ("request_", "unfed"),
    [
        (TextRequest(scripted(0)), [1, 0]),
        (TextRequest(scripted(0), stop=("me",)), [1, 0]),
        (TextRequest(scripted(0), num_predict=3), [1, 1]),
    ],
    ids=["stop token", "stop string", "length"],
)
def test_what_a_slot_holds_is_known_exactly_at_the_end(request_: TextRequest, unfed: list[int], depth: int):
    executor = FakeExecutor("some text", depth=depth)
    engine = make_engine(executor)
    engine.add(1, engine.prepare(request_))
    row = engine._rows[1]
    while not engine.idle:
        engine.step()
    assert executor.slots[0] == row.tokens[: row.fed]
    assert row.unfed == unfed[depth]


def test_after_the_last_row_nothing_is_held(depth: int):
    executor = FakeExecutor("some text", depth=depth)
    engine = make_engine(executor)
    run(engine, TextRequest(scripted(0)), TextRequest("abc", num_predict=3))
    assert executor.living_steps() == 0
    assert executor.living_slots() == 0
    engine.add(1, engine.prepare(TextRequest(scripted(0))))
    engine.step()
    engine.close()
    assert executor.closed
    assert executor.living_steps() == 0


def test_cancelling_what_is_unknown_is_no_error():
    engine = make_engine(FakeExecutor("yes"))
    engine.cancel(5)
    assert engine.step() == []


def test_a_long_step_makes_the_next_chunk_smaller(monkeypatch: pytest.MonkeyPatch):
    now, lengths = [0], []

    def slow(number: int, step: Step) -> None:
        lengths.append(step.rows[-1].length)
        now[0] += 100_000_000 * step.rows[-1].length

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    engine = make_engine(FakeExecutor(before_step=slow), context_length=1000, prefill_chunk=64)
    run(engine, TextRequest("x" * 300, GREEDY, num_predict=1))
    assert lengths[0] == 64
    assert set(lengths[1:-1]) == {MIN_CHUNK}
    assert sum(lengths) == 300
