"""Every answer that is finished satisfies its format, whatever the row does besides; every other one is a beginning."""

import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from models.errors import GrammarError
from models.grammar import GBNF, JSONSchema, OutputFormat
from models.grammar.matcher import Matcher
from runner.engine.prefix_cache import PrefixCache
from runner.engine.types import FinishReason, SamplingParams, TextRequest
from tests.fakes import POISON, FakeExecutor, scripted
from tests.models.grammar.vocabularies import compiled
from tests.runner.engine.serving import Answer, admit, make_engine, real_executor, run, to_the_end

GREEDY, HOT = SamplingParams(temperature=0), SamplingParams(temperature=1.5, top_k=0, top_p=1.0)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "n": {"type": "integer", "minimum": -5, "maximum": 500},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "tags", "n", "more"],
}
FORMAT = OutputFormat(JSONSchema(json.dumps(SCHEMA)))
LONG = 600


def request(prompt: str = "describe it: ", sampling: SamplingParams = GREEDY, **more) -> TextRequest:
    return TextRequest(prompt, sampling, **({"format": FORMAT, "num_predict": LONG} | more))


def check(answer: Answer, schema=SCHEMA) -> None:
    if answer.done.reason is FinishReason.STOP:
        jsonschema.validate(json.loads(answer.text), schema)
    else:
        assert is_beginning(answer.text, schema), answer.text


def is_beginning(text: str, schema) -> bool:
    said = list(text.removesuffix("\ufffd").encode())
    return compiled(json.dumps(schema)).matcher().admitted(said) == len(said)


def served(executor: FakeExecutor, *requests: TextRequest, **options) -> list[Answer]:
    return run(make_engine(executor, context_length=1024, **options), *requests)


def finished(answers: Sequence[Answer]) -> None:
    for answer in answers:
        assert answer.done.reason is FinishReason.STOP
        check(answer)


def varied() -> list[TextRequest]:
    penalties = SamplingParams(
        temperature=0.9, repeat_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5, repeat_last_n=-1
    )
    samplings = [GREEDY, HOT, penalties, SamplingParams(typical_p=0.5), SamplingParams(top_k=0, top_p=0, min_p=0.2)]
    return [
        request(f"prompt {number}: ", replace(sampling, seed=number), logprobs=number % 2 > 0, top_logprobs=4)
        for number, sampling in enumerate(samplings * 3)
    ]


@pytest.mark.parametrize("draft", [0, 5])
def test_answers_satisfy_their_schema_in_company_and_with_drafts(depth: int, draft: int):
    free = [TextRequest(f"free {number}", HOT, num_predict=60) for number in range(5)]
    requests = [each for pair in itertools.zip_longest(varied(), free) for each in pair if each is not None]
    answers = served(FakeExecutor(depth=depth), *requests, draft=draft)
    held = [answer for each, answer in zip(requests, answers, strict=True) if each.format is not None]
    assert len(held) == 15
    finished(held)


def test_an_answer_does_not_depend_on_its_company_nor_on_drafts(depth: int):
    alone = [served(FakeExecutor(depth=depth), each)[0] for each in varied()]
    together = served(FakeExecutor(depth=depth), *varied())
    drafted = served(FakeExecutor(depth=depth), *varied(), draft=6)
    assert [each.text for each in together] == [each.text for each in alone]
    assert [each.text for each in drafted] == [each.text for each in alone]
    assert sum(each.done.accepted_tokens for each in drafted) > 0, "the drafts were put to the test"


def test_a_free_row_beside_it_says_what_it_says_alone(depth: int):
    free = TextRequest("free", HOT, num_predict=80)
    alone = served(FakeExecutor(depth=depth), replace(free, sampling=replace(HOT, seed=3)))[0]
    beside = served(FakeExecutor(depth=depth), request(), replace(free, sampling=replace(HOT, seed=3)))[1]
    assert beside.text == alone.text


def test_free_rows_run_ahead_while_a_held_one_waits():
    """Where a step may be begun before the last one was read, only the row waits whose next mask it decides."""
    steps: list[tuple[int, ...]] = []
    executor = FakeExecutor(depth=1, before_step=lambda _, step: steps.append(tuple(row.slot for row in step.rows)))
    served(executor, request("held"), TextRequest("free", GREEDY, num_predict=40))
    decoding = steps[2:36]
    assert all(1 in slots for slots in decoding), "the free row is in every step"
    assert executor.most_under_way == 2


@pytest.mark.parametrize("budget", [1, 2, 7, 20, 33])
def test_an_answer_cut_by_its_budget_is_the_beginning_of_one(budget: int):
    answer = served(FakeExecutor(), request(num_predict=budget))[0]
    assert answer.done.reason is FinishReason.LENGTH
    check(answer)


def test_an_answer_cut_by_the_context_is_the_beginning_of_one():
    answer = served(FakeExecutor(), request(num_ctx=40))[0]
    assert answer.done.reason is FinishReason.LENGTH
    check(answer)


def test_an_answer_may_go_on_over_a_context_shift(depth: int):
    engine = make_engine(FakeExecutor(depth=depth), context_length=40)
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 40, "maxItems": 45}
    wanted = OutputFormat(JSONSchema(json.dumps(schema)))
    (answer,) = run(engine, request("a prompt of some tokens", format=wanted, shift=True, num_predict=None))
    assert answer.done.reason is FinishReason.STOP
    check(answer, schema)
    assert answer.done.eval_tokens > 40


def test_a_stop_string_cuts_an_answer():
    answer = served(FakeExecutor(), request(stop=('"tags"',)))[0]
    assert answer.done.reason is FinishReason.STOP
    assert '"tags"' not in answer.text
    assert is_beginning(answer.text, SCHEMA)


def test_an_answer_ends_by_itself_without_a_stop_token():
    answer = served(FakeExecutor(), request())[0]
    assert not answer.done.stop_token
    assert answer.text.endswith("}")
    assert answer.done.eval_tokens == len(answer.text.encode())


def test_a_prefix_that_is_kept_changes_nothing(depth: int):
    executor = FakeExecutor(depth=depth)
    engine = make_engine(executor, context_length=1024, prefix_cache=PrefixCache(executor, 1 << 20))
    first, second = (run(engine, request("a prompt as long as some chunks, " * 3))[0] for _ in range(2))
    assert second.done.cached_tokens > first.done.cached_tokens
    assert second.text == first.text
    finished([first, second])


def test_logprobs_are_told_of_what_may_be_said():
    answer = served(FakeExecutor(), request(logprobs=True, top_logprobs=3))[0]
    assert len(answer.logprobs) == answer.done.eval_tokens
    assert (answer.logprobs[0].token, answer.logprobs[0].logprob) == ("{", 0.0)
    assert all(entry.logprob <= 0 for entry in answer.logprobs)


def test_a_grammar_is_obeyed(depth: int):
    wanted = OutputFormat(GBNF('root ::= ("yes" | "no") ", " [a-c]{3}'))
    for seed in range(6):
        said = served(FakeExecutor(depth=depth), request(sampling=replace(HOT, seed=seed), format=wanted))[0].text
        assert said.split(", ")[0] in ("yes", "no")
        assert len(said.split(", ")[1]) == 3
        assert {*said.split(", ")[1]} <= {*"abc"}


THINKING = replace(FORMAT, closings=("</think>", "<|done|>"))


@pytest.mark.parametrize("draft", [0, 5])
@pytest.mark.parametrize("closing", THINKING.closings)
def test_thinking_is_free_and_what_follows_satisfies_the_schema(depth: int, closing: str, draft: int):
    thoughts = f"{{not json}} </thi <b> {closing}"
    executor = FakeExecutor(thoughts + "and no json either", depth=depth)
    (answer,) = served(executor, request(scripted(0), format=THINKING), draft=draft)
    assert answer.text.startswith(thoughts)
    jsonschema.validate(json.loads(answer.text.removeprefix(thoughts)), SCHEMA)


def test_thinking_may_end_without_an_answer(depth: int):
    (answer,) = served(FakeExecutor("no closing", depth=depth), request(scripted(0), format=THINKING))
    assert (answer.text, answer.done.stop_token) == ("no closing", True)


def test_a_matcher_that_fails_ends_its_row_and_no_other(depth: int, monkeypatch: pytest.MonkeyPatch):
    calls = itertools.count()
    masks = Matcher.masks

    def failing(matcher: Matcher, drafted: Sequence[int]) -> list[bytes]:
        if next(calls) == 9:
            raise GrammarError("too complex")
        return masks(matcher, drafted)

    monkeypatch.setattr(Matcher, "masks", failing)
    answers = served(FakeExecutor(depth=depth), request("a"), TextRequest("free", GREEDY, num_predict=30), request("b"))
    failed = [answer for answer in answers if not hasattr(answer.end, "reason")]
    assert [str(answer.error) for answer in failed] == ["the answer's grammar failed: too complex"]
    assert is_beginning(failed[0].text, SCHEMA)
    for answer in answers:
        if answer is not failed[0] and answer is not answers[1]:
            finished([answer])
    assert answers[1].done.eval_tokens > 0


def test_logits_that_are_no_numbers_end_a_held_row(depth: int):
    (answer,) = served(FakeExecutor(depth=depth), request(chr(POISON)))
    assert "finite" in str(answer.error)


def test_a_request_that_leaves_takes_its_constraint_along(depth: int):
    engine = make_engine(FakeExecutor(depth=depth))
    admit(engine, 1, request())
    for _ in range(5):
        engine.step()
        engine.proceed()
    engine.cancel(1)
    engine.proceed()
    assert engine.idle
    assert engine._rows == {}
    finished(run(engine, request()))


def test_masks_are_made_while_the_model_runs(monkeypatch: pytest.MonkeyPatch):
    """The model waits until the mask of its own step is made: were it made behind the step, nobody would come on."""
    made = threading.Semaphore(0)
    masks = Matcher.masks

    def noting(matcher: Matcher, drafted: Sequence[int]) -> list[bytes]:
        found = masks(matcher, drafted)
        made.release()
        return found

    monkeypatch.setattr(Matcher, "masks", noting)

    def waiting(number, step) -> None:
        if step.wanted:
            assert made.acquire(timeout=30), "the mask was not made meanwhile"

    finished(served(FakeExecutor(before_step=waiting), request("short")))


def test_closing_the_engine_ends_the_thread_of_the_masks():
    engine = make_engine(FakeExecutor(), context_length=1024)
    run(engine, request())
    assert any(thread.name.startswith("masks") for thread in threading.enumerate())
    engine.close()
    assert not any(thread.name.startswith("masks") for thread in threading.enumerate())


@pytest.mark.parametrize("kind", ["onnx", "mlx", "mlx ahead"])
def test_real_executors_obey_a_schema(parity: Path, kind: str):
    engine = make_engine(real_executor(parity / "llama_gqa", kind, slots=4), context_length=512, draft=3)
    requests = [request(f"row {seed}", replace(HOT, seed=seed), num_predict=400) for seed in range(3)]
    answers = run(engine, *requests, TextRequest("free", GREEDY, num_predict=20))
    for answer in answers[:3]:
        check(answer)
    assert any(answer.done.reason is FinishReason.STOP for answer in answers[:3])
    to_the_end(engine)
