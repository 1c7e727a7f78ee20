"""Drafting changes how many steps an answer takes, nothing else: it is compared with an engine that does not draft."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from models.executors.base import Step
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import Failed, FinishReason, Output, SamplingParams, TextDone, TextRequest
from tests.fakes import POISON, FakeExecutor, scripted
from tests.runner.engine.oracle import DRAFT, KINDS, LIES, Poisoner, assert_same, drafting_engine, oracle
from tests.runner.engine.serving import GREEDY, Answer, answer, make_engine, run, to_the_end

pytestmark = pytest.mark.usefixtures("drafts_are_free")


# --- the same answer, whatever was guessed


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("params", KINDS, ids=str)
def test_a_row_says_with_every_way_of_sampling_what_it_says_without_drafts(params, lies: str, depth: int):
    request = TextRequest("once upon a time ", params, num_predict=40, logprobs=True, top_logprobs=2)
    model = FakeExecutor(depth=depth)
    plain = run(make_engine(FakeExecutor()), request)
    drafter = oracle(make_engine(FakeExecutor()), [request], lies)
    drafted = run(drafting_engine(model, make_drafter=drafter), request)
    assert_same(drafted, plain)
    done = drafted[0].done
    assert done.drafted_tokens > 0
    if lies == "never":
        assert done.accepted_tokens == done.drafted_tokens > done.eval_tokens * 0.7
        assert model.steps < done.eval_tokens * 0.5
    if lies == "always":
        assert done.accepted_tokens == 0


@pytest.mark.parametrize("lies", LIES)
def test_rows_that_join_leave_and_draft_change_nothing_for_each_other(lies: str, depth: int):
    requests = [
        TextRequest(f"row {n} " * (3 * n % 5 + 1), params, num_predict=20 + 7 * n % 20, logprobs=n % 2 == 0)
        for n, params in enumerate(KINDS)
    ]
    # Some of the rows do not draft, so they run ahead whenever they are alone.
    requests = [replace(request, draft=0 if n % 3 == 2 else None) for n, request in enumerate(requests)]
    plain = [answer(FakeExecutor(), request) for request in requests]
    drafter = oracle(make_engine(FakeExecutor()), requests, lies)
    engine = drafting_engine(FakeExecutor(depth=depth), make_drafter=drafter, parallel=3, prefill_chunk=5)
    outputs: dict[int, list[Output]] = {n: [] for n in range(len(requests))}
    for step in range(400):
        if step % 3 == 0 and step // 3 < len(requests):
            engine.add(step // 3, engine.prepare(requests[step // 3]))
        if step == 11:
            engine.add(99, engine.prepare(TextRequest("a passer-by " * 5, num_predict=50)))
        if step == 20:
            engine.cancel(99)
        for output in engine.step():
            if output.id != 99:
                outputs[output.id].append(output)
        engine.proceed()
    assert_same([Answer(outputs[n]) for n in outputs], plain)


@pytest.mark.parametrize("script", ["Grüße, Grüße, Grüße 世界世界世界世界 🎉🎉🎉🎉!", "abcabcabcabcabc" * 3])
def test_text_that_repeats_itself_takes_fewer_steps(script: str, depth: int):
    model = FakeExecutor(script, depth=depth)
    (got,) = run(drafting_engine(model), TextRequest(scripted(0), GREEDY, logprobs=True))
    assert_same([got], [answer(FakeExecutor(script), TextRequest(scripted(0), GREEDY, logprobs=True))])
    assert all("\ufffd" not in piece for piece in got.pieces)
    assert model.steps < len(script.encode()) * 0.7
    assert model.steps + got.done.accepted_tokens == got.done.eval_tokens + 1


# --- ends


@pytest.mark.parametrize("stop", ["</s>", "s>", "o</s>t", "e"])
@pytest.mark.parametrize("draft", [1, 4])
def test_a_stop_string_ends_the_answer_wherever_it_falls_in_a_run(stop: str, draft: int, depth: int):
    requests = [
        TextRequest(scripted(0, "x" * n), GREEDY, stop=(stop,), logprobs=True, num_predict=12) for n in range(6)
    ]
    script = "one two</s>three"
    plain = [answer(FakeExecutor(script), request) for request in requests]
    drafter = oracle(make_engine(FakeExecutor(script)), [replace(each, stop=()) for each in requests], "never")
    drafted = run(drafting_engine(FakeExecutor(script, depth=depth), draft=draft, make_drafter=drafter), *requests)
    assert_same(drafted, plain)
    assert drafted[0].done.reason is FinishReason.STOP


@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 14])
def test_nothing_is_drafted_beyond_num_predict(count: int, depth: int):
    request = TextRequest("0123456789", GREEDY, num_predict=count)
    drafter = oracle(make_engine(FakeExecutor()), [replace(request, num_predict=40)], "never")
    model = FakeExecutor(depth=depth)
    engine = drafting_engine(model, make_drafter=drafter)
    fed = fed_at_most(model)
    assert_same(run(engine, request), [answer(FakeExecutor(), request)])
    assert fed() <= 10 + count - 1
    assert model.steps <= 1 + -(-(count - 1) // (DRAFT + 1))


def fed_at_most(model: FakeExecutor) -> Callable[[], int]:
    """The most tokens that any slot was given from now on."""
    most = [0]

    def note(number: int, step: Step) -> None:
        most[0] = max(most[0], *(row.begin + row.length for row in step.rows))

    model.before_step = note
    return lambda: most[0]


@pytest.mark.parametrize("num_ctx", [12, 13, 17, 18, 22])
def test_nothing_is_drafted_beyond_the_context(num_ctx: int, depth: int):
    request = TextRequest("0123456789", GREEDY, num_ctx=num_ctx)
    drafter = oracle(make_engine(FakeExecutor()), [replace(request, num_ctx=64)], "never")
    model = FakeExecutor(depth=depth)
    engine = drafting_engine(model, make_drafter=drafter)
    fed = fed_at_most(model)
    assert_same(run(engine, request), [answer(FakeExecutor(), request)])
    assert fed() < num_ctx


@pytest.mark.parametrize("room", [0, 2])
def test_no_more_is_drafted_than_the_executor_can_take_back(room: int, depth: int):
    lengths: list[int] = []
    model = FakeExecutor(
        "ab" * 30, depth=depth, draft_room=room, before_step=lambda _, step: lengths.append(step.rows[0].length - 1)
    )
    (got,) = run(drafting_engine(model), TextRequest(scripted(0), GREEDY))
    assert (got.text, max(lengths)) == ("ab" * 30, room)


@pytest.mark.parametrize("lies", LIES)
def test_a_context_shifts_as_without_drafts(lies: str, depth: int):
    requests = [
        TextRequest("keep this: " * n, params, num_predict=70, num_ctx=16 + 12 * n, shift=True)
        for n, params in enumerate(KINDS[:4], 1)
    ]
    drafter = oracle(make_engine(FakeExecutor()), requests, lies)
    drafted = run(drafting_engine(FakeExecutor(depth=depth), make_drafter=drafter), *requests)
    assert_same(drafted, [answer(FakeExecutor(), request) for request in requests])
    by_lookup = run(drafting_engine(FakeExecutor(depth=depth)), *requests)
    assert_same(by_lookup, drafted)


def test_lookup_goes_on_after_a_shift_with_what_is_left(depth: int):
    request = TextRequest(scripted(0), GREEDY, num_predict=150, num_ctx=40, num_keep=1, shift=True)
    (got,) = run(drafting_engine(FakeExecutor("abcdefg " * 40, depth=depth)), request)
    assert_same([got], [answer(FakeExecutor("abcdefg " * 40), request)])
    assert got.done.accepted_tokens > 75


def test_logits_that_are_no_numbers_fail_the_row_behind_right_drafts(depth: int):
    script = b"all is well " + bytes([POISON]) + b"lost"
    request = TextRequest(scripted(0, "123456"), GREEDY)
    plain = answer(FakeExecutor(script), request)
    drafter = oracle(make_engine(FakeExecutor(script)), [request], "never")
    drafted = run(drafting_engine(FakeExecutor(script, depth=depth), make_drafter=drafter), request)[0]
    assert isinstance(drafted.end, Failed)
    assert (drafted.text, str(drafted.error)) == (plain.text, str(plain.error))


@pytest.mark.parametrize("params", KINDS[:5], ids=str)
def test_logits_behind_a_wrong_draft_harm_nobody(params: SamplingParams, depth: int):
    request = TextRequest("x", params, num_predict=30)
    drafted = run(drafting_engine(FakeExecutor(depth=depth), make_drafter=Poisoner), request)[0]
    assert_same([drafted], [answer(FakeExecutor(), request)])


# --- what a slot holds


class Checked(PrefixCache):
    """Looks into every row that is stored."""

    def __init__(self, executor: FakeExecutor) -> None:
        super().__init__(executor, 1 << 20)
        self.held = executor.slots
        self.stored = 0

    def store(self, slot: int, fed: int, tokens: Sequence[int]) -> None:
        assert fed <= len(self.held[slot])
        assert self.held[slot][: len(tokens)] == list(tokens)
        self.stored += 1
        super().store(slot, fed, tokens)


def checked_engine(executor: FakeExecutor, **options) -> TextEngine:
    return drafting_engine(executor, prefix_cache=Checked(executor), **options)


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("phase", [4, 6, 9])
def test_a_cancelled_row_leaves_only_what_it_said(lies: str, phase: int, depth: int):
    request = TextRequest("0123456789" * 3, SamplingParams(seed=5), num_predict=60)
    drafter = oracle(make_engine(FakeExecutor()), [request], lies)
    executor = FakeExecutor(depth=depth)
    engine = checked_engine(executor, make_drafter=drafter)
    for number in (1, 2):
        engine.add(number, engine.prepare(replace(request, prompt=str(number) + request.prompt)))
    for step in range(phase + 8):
        if step == phase:
            row = engine._rows[1]
            engine.cancel(1)
            assert executor.slots[row.slot][: row.fed] == row.tokens[: row.fed]
        engine.step()
        engine.proceed()
    assert engine._store._prefixes.stored > 0
    engine.cancel(2)
    assert_same(run(engine, request), [answer(FakeExecutor(), request)])


def test_a_second_turn_is_served_from_what_drafts_have_left(depth: int):
    engine = checked_engine(FakeExecutor("tick tock " * 8, depth=depth))
    request = TextRequest(scripted(0, "go on: "), GREEDY, num_predict=50)
    (first,) = run(engine, request)
    assert first.done.accepted_tokens > 20
    (second,) = run(engine, replace(request, prompt=request.prompt + first.text + "?"))
    assert second.done.cached_tokens >= len(request.prompt) + 49


@pytest.mark.parametrize(
    "request_",
    [
        TextRequest(scripted(0), GREEDY),
        *(TextRequest(scripted(0), GREEDY, stop=("ab ab ab ab ab"[:length],)) for length in range(7, 14)),
        TextRequest(scripted(0), GREEDY, num_predict=16),
    ],
    ids=lambda request_: f"stop {len(request_.stop[0])}" if request_.stop else "length" if request_.num_predict else "",
)
def test_what_a_slot_holds_is_known_exactly_at_the_end(request_: TextRequest, depth: int):
    model = FakeExecutor("ab ab ab ab ab ab", depth=depth)
    engine = drafting_engine(model)
    engine.add(1, engine.prepare(request_))
    row = engine._rows[1]
    while not engine.idle:
        engine.step()
    assert model.slots[0][: row.fed] == row.tokens[: row.fed]
    assert row.unfed in {0, 1}


def test_a_step_that_raises_fails_its_rows_only(depth: int):
    def fail(number: int, step: Step) -> None:
        if number == 6:
            raise ValueError("a bad step")

    engine = checked_engine(FakeExecutor("ab" * 30, depth=depth, before_step=fail))
    engine.add(1, engine.prepare(TextRequest(scripted(0), GREEDY)))
    with pytest.raises(ValueError, match="a bad step"):
        to_the_end(engine)
    assert isinstance(engine.abandon(ValueError("a bad step"))[-1], Failed)
    assert run(engine, TextRequest(scripted(0), GREEDY))[0].text == "ab" * 30


# --- on, off, and whether it pays


def test_drafting_is_off_unless_the_process_allows_it():
    (got,) = run(make_engine(FakeExecutor("ab" * 20)), TextRequest(scripted(0), GREEDY, draft=4))
    assert (got.done.drafted_tokens, got.done.eval_tokens) == (0, 40)


@pytest.mark.parametrize(("asked", "most"), [(None, 5), (0, 0), (2, 2), (9, 5)])
def test_a_request_may_lower_what_is_drafted(asked: int | None, most: int):
    lengths: list[int] = []
    model = FakeExecutor("ab" * 30, before_step=lambda _, step: lengths.append(step.rows[0].length - 1))
    run(drafting_engine(model), TextRequest(scripted(0), GREEDY, draft=asked))
    assert max(lengths) == most


def slow_by_tokens(monkeypatch: pytest.MonkeyPatch, model: FakeExecutor, each_ns: int) -> None:
    """A step takes a millisecond, and every token beyond the first some more."""
    now = [0]

    def work(number: int, step: Step) -> None:
        now[0] += 1_000_000 + each_ns * (sum(row.length for row in step.rows) - 1)

    model.before_step = work
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])


@pytest.mark.parametrize(("each_ns", "pays"), [(50_000, True), (900_000, False)])
def test_whether_drafting_pays_is_measured(each_ns: int, pays: bool, monkeypatch: pytest.MonkeyPatch, depth: int):
    request = TextRequest("once upon a time ", GREEDY, num_predict=150)
    plain = answer(FakeExecutor(), request)
    drafter = oracle(make_engine(FakeExecutor()), [request], "now and then")
    model = FakeExecutor(depth=depth)
    slow_by_tokens(monkeypatch, model, each_ns)
    got = answer(model, request, draft=DRAFT, make_drafter=drafter)
    assert_same([got], [plain])
    if pays:
        assert got.done.accepted_tokens > 0.4 * got.done.eval_tokens
    else:
        assert 0 < got.done.drafted_tokens < 0.5 * got.done.eval_tokens


def test_a_row_that_has_stopped_drafting_runs_ahead_again(monkeypatch: pytest.MonkeyPatch):
    request = TextRequest("once upon a time ", GREEDY, num_predict=60)
    drafter = oracle(make_engine(FakeExecutor()), [request], "always")
    planned: list[tuple[int, ...]] = []
    executor = FakeExecutor(depth=1)
    slow_by_tokens(monkeypatch, executor, 900_000)
    work = executor.before_step

    def note(number: int, step: Step) -> None:
        work(number, step)
        planned.append(step.rows[0].tokens)

    executor.before_step = note
    run(drafting_engine(executor, make_drafter=drafter), request)
    assert planned.count(()) > 15


def test_acceptance_is_told_in_the_counts_the_log_and_the_status(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "runner.engine")
    engine = drafting_engine(FakeExecutor("ab" * 20))
    answers = run(engine, TextRequest(scripted(0), GREEDY), TextRequest(scripted(0, "x"), GREEDY))
    lines = [record.fields for record in caplog.records if record.message == "completion done"]
    counts = [(each.done.drafted_tokens, each.done.accepted_tokens) for each in answers]
    assert [(line["drafted"], line["accepted"]) for line in lines] == counts
    assert all(drafted >= accepted > 20 for drafted, accepted in counts)
    status = engine.status()
    assert (status.drafted_tokens, status.accepted_tokens) == tuple(map(sum, zip(*counts, strict=True)))


def test_the_counts_of_an_answer_without_drafts_are_zero():
    done = answer(FakeExecutor("four"), TextRequest(scripted(0))).end
    assert isinstance(done, TextDone)
    assert (done.drafted_tokens, done.accepted_tokens) == (0, 0)


def test_after_the_last_row_nothing_is_held(depth: int):
    model = FakeExecutor("ab" * 20, depth=depth)
    engine = drafting_engine(model)
    run(engine, TextRequest(scripted(0), GREEDY), TextRequest("abc", GREEDY, num_predict=3))
    assert (model.living_steps(), model.living_slots()) == (0, 0)
