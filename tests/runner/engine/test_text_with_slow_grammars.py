"""A grammar is compiled while its row's prompt is read: nobody else waits for it, and nothing is computed twice."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from models.executors.base import Step
from models.grammar import JSONSchema, OutputFormat
from runner.engine import loop as loop_module
from runner.engine.loop import COMPLETIONS, EngineLoop
from runner.engine.sequence import SequenceStatus
from runner.engine.text import TextEngine
from runner.engine.types import Failed, RequestId, SamplingParams, TextRequest
from runner.errors import BadRequest, NotReady
from tests.fakes import POISON, FakeExecutor, SlowCompiler
from tests.runner.engine.conftest import Serve
from tests.runner.engine.serving import Answer, admit, ask, make_engine, real_executor, run, to_the_end

PATIENCE_S = 60
GREEDY, HOT = SamplingParams(temperature=0), SamplingParams(temperature=1.2, top_k=0, seed=5)
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2, 3]}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
FORMAT = OutputFormat(JSONSchema(json.dumps(SCHEMA)))
WRONG = OutputFormat(JSONSchema('{"type":"foo"}'))
PROMPT = "a prompt of more than two chunks, of which each has sixteen tokens: "


@pytest.fixture
def compiler():
    compiler = SlowCompiler()
    yield compiler
    compiler.let_go.set()


def held(prompt: str = PROMPT, sampling: SamplingParams = GREEDY, **more) -> TextRequest:
    return TextRequest(prompt, sampling, **({"format": FORMAT, "num_predict": 100} | more))


def satisfied(answer: Answer) -> None:
    jsonschema.validate(json.loads(answer.text), SCHEMA)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is looked at knows of no event
            await asyncio.sleep(0)


# --- the engine


def row_of(engine: TextEngine, number: RequestId):
    return engine._rows[number]


def run_late(engine: TextEngine, late: TextRequest, *others: TextRequest) -> list[Answer]:
    """Serve a request that comes while others decode, and whose grammar is compiled when they have been answered."""
    for number, request in enumerate(others, 1):
        admit(engine, number, request)
    outputs = []
    for _ in range(4):
        outputs += engine.step()
        engine.proceed()
    prepared = engine.prepare(late)
    engine.add(0, prepared)
    outputs += to_the_end(engine)
    assert row_of(engine, 0).status is SequenceStatus.HELD
    assert not any(output.id == 0 for output in outputs), "nothing is said before it is known what may be said"
    engine.completion(prepared)()
    outputs += [*engine.step(), *to_the_end(engine)]
    return [Answer([output for output in outputs if output.id == number]) for number in range(1 + len(others))]


def test_a_prompt_is_read_and_others_answered_before_the_grammar_is_there(depth: int):
    steps: list[Step] = []
    executor = FakeExecutor(depth=depth, before_step=lambda _, step: steps.append(step))
    engine = make_engine(executor, context_length=512)
    late, free = run_late(engine, held(), TextRequest("free", GREEDY, num_predict=30))
    satisfied(late)
    assert free.done.eval_tokens == 30
    fed = [row.tokens for step in steps for row in step.rows if row.slot == 1]
    assert b"".join(map(bytes, fed)) == (PROMPT + late.text[:-1]).encode(), "each token is run once"


def test_how_long_the_grammar_takes_changes_no_answer(depth: int):
    others = [TextRequest(f"free {number}", HOT, num_predict=20) for number in range(2)]
    request = held(sampling=HOT, logprobs=True, top_logprobs=3)
    early = run(make_engine(FakeExecutor(depth=depth), context_length=512), request, *others)
    late = run_late(make_engine(FakeExecutor(depth=depth), context_length=512), request, *others)
    for one, other in zip(early, late, strict=True):
        assert (one.text, one.logprobs) == (other.text, other.logprobs)


@pytest.mark.parametrize("draft", [0, 4])
def test_a_row_that_was_held_drafts_and_is_penalised_like_any_other(depth: int, draft: int):
    penalised = SamplingParams(temperature=0.9, seed=3, repeat_penalty=1.4, frequency_penalty=0.3)
    early = run(make_engine(FakeExecutor(depth=depth), context_length=512, draft=draft), held(sampling=penalised))
    late = run_late(make_engine(FakeExecutor(depth=depth), context_length=512, draft=draft), held(sampling=penalised))
    assert late[0].text == early[0].text
    satisfied(late[0])


@pytest.mark.parametrize("kind", ["onnx", "mlx", "mlx ahead"])
def test_real_executors_draw_from_the_logits_that_were_kept(parity: Path, kind: str):
    request = held(sampling=HOT, logprobs=True, top_logprobs=2)
    free = TextRequest("free", GREEDY, num_predict=12)
    executor = real_executor(parity / "llama_gqa", kind, slots=4)
    early = run(make_engine(executor, context_length=512), request, free)
    late = run_late(make_engine(executor, context_length=512), request, free)
    assert late[0].text == early[0].text
    satisfied(late[0])
    if kind == "onnx":
        assert late[0].logprobs == early[0].logprobs, "to the last bit"
    executor.close()


def test_a_row_that_leaves_while_it_is_held_leaves_nothing(depth: int):
    executor = FakeExecutor(depth=depth)
    engine = make_engine(executor)
    prepared = engine.prepare(held())
    engine.add(1, prepared)
    to_the_end(engine)
    engine.cancel(1)
    engine.step()
    engine.proceed()
    assert engine.idle
    assert engine._rows == {}
    assert executor.living_slots() == 0
    engine.completion(prepared)()
    assert engine.step() == []
    satisfied(run(engine, held())[0])


# --- the loop around it


async def test_a_slow_grammar_holds_up_neither_its_prompt_nor_others(serve: Serve, compiler: SlowCompiler, depth: int):
    executor = FakeExecutor(depth=depth)
    loop = await serve(executor, grammars=compiler, context_length=512)
    slow = asyncio.create_task(ask(loop, held()))
    await until(lambda: len(executor.slots.get(0, ())) == len(PROMPT))
    assert (await ask(loop, TextRequest("free", GREEDY, num_predict=20))).done.eval_tokens == 20
    assert not slow.done()
    compiler.let_go.set()
    satisfied(await slow)


async def test_while_a_row_is_held_the_executors_thread_rests(
    serve: Serve, compiler: SlowCompiler, monkeypatch: pytest.MonkeyPatch
):
    executor = FakeExecutor()
    loop = await serve(executor, grammars=compiler, context_length=512)
    slow = asyncio.create_task(ask(loop, held()))
    await until(lambda: len(executor.slots.get(0, ())) == len(PROMPT))
    await loop._thread.call(lambda: None)
    ticks = []
    monkeypatch.setattr(loop_module, "tick", lambda *args: ticks.append(args))
    for _ in range(20):
        await asyncio.sleep(0)
        await loop._thread.call(lambda: None)
    assert ticks == []
    monkeypatch.undo()
    compiler.let_go.set()
    satisfied(await slow)


async def test_a_grammar_that_is_there_when_the_thread_comes_to_rest_is_noticed(
    serve: Serve, compiler: SlowCompiler, monkeypatch: pytest.MonkeyPatch
):
    resting, go_on = threading.Event(), threading.Event()

    def proceed(engine: TextEngine) -> None:
        if engine.idle and not go_on.is_set():
            resting.set()
            assert go_on.wait(PATIENCE_S)

    loop = await serve(FakeExecutor(), grammars=compiler, context_length=512)
    monkeypatch.setattr(TextEngine, "proceed", proceed)
    slow = asyncio.create_task(ask(loop, held()))
    await until(resting.is_set)
    compiler.let_go.set()
    await until(lambda: loop._completed)
    go_on.set()
    satisfied(await asyncio.wait_for(slow, PATIENCE_S / 2))


async def test_a_grammar_that_fails_takes_its_row_out_and_is_a_bad_request(serve: Serve, compiler: SlowCompiler):
    executor = FakeExecutor()
    loop = await serve(executor, grammars=compiler)
    wrong = asyncio.create_task(ask(loop, held(format=WRONG)))
    await until(lambda: len(executor.slots.get(0, ())) == len(PROMPT))
    compiler.let_go.set()
    with pytest.raises(BadRequest, match="foo"):
        await wrong
    await until(lambda: loop.status.running == 0 and executor.living_slots() == 0)
    satisfied(await ask(loop, held()))


async def test_a_request_that_leaves_while_its_grammar_is_compiled_leaves_nothing(
    serve: Serve, compiler: SlowCompiler, depth: int
):
    executor = FakeExecutor(depth=depth)
    loop = await serve(executor, grammars=compiler)
    leaving = asyncio.create_task(ask(loop, held()))
    await until(lambda: len(executor.slots.get(0, ())) == len(PROMPT))
    leaving.cancel()
    await asyncio.wait({leaving})
    await until(lambda: loop.status.running == 0 and executor.living_slots() == 0)
    assert loop._readers == {}
    compiler.let_go.set()
    satisfied(await ask(loop, held()))


async def test_what_nobody_wants_any_more_is_not_compiled(serve: Serve, compiler: SlowCompiler):
    loop = await serve(FakeExecutor(), grammars=compiler, parallel=2 * COMPLETIONS)
    formats = [OutputFormat(JSONSchema(json.dumps({"const": number}))) for number in range(2 * COMPLETIONS)]
    wanted = [asyncio.create_task(ask(loop, held(format=each))) for each in formats[:COMPLETIONS]]
    await until(lambda: compiler.begun == COMPLETIONS)
    leaving = [asyncio.create_task(ask(loop, held(format=each))) for each in formats[COMPLETIONS:]]
    await until(lambda: loop.status.running == 2 * COMPLETIONS)
    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)
    compiler.let_go.set()
    assert [(await task).text for task in wanted] == [str(number) for number in range(COMPLETIONS)]
    assert compiler.begun == COMPLETIONS


async def test_preparing_others_does_not_wait_for_slow_grammars(serve: Serve, compiler: SlowCompiler):
    loop = await serve(FakeExecutor(), grammars=compiler, parallel=2)
    asking = [asyncio.create_task(ask(loop, held())) for _ in range(40)]
    await until(lambda: len(loop._readers) == 40)
    assert len(await loop.tokenize("ab", add_bos=False)) == 2
    compiler.let_go.set()
    for task in asking:
        satisfied(await task)


async def first_of(loop: EngineLoop, request: TextRequest):
    async with loop.submit(request) as outputs:
        return await anext(outputs)


async def test_a_step_that_fails_is_told_although_the_grammar_is_not_there_yet(serve: Serve, compiler: SlowCompiler):
    def broken(number: int, step: Step) -> None:
        if number == 1:
            raise ValueError("the device is gone")

    loop = await serve(FakeExecutor(before_step=broken), grammars=compiler)
    output = await asyncio.wait_for(first_of(loop, held()), PATIENCE_S / 2)
    assert isinstance(output, Failed)
    assert "the device is gone" in str(output.error)


async def test_logits_that_are_no_numbers_end_a_row_that_was_held(serve: Serve, compiler: SlowCompiler):
    executor = FakeExecutor()
    loop = await serve(executor, grammars=compiler)
    asking = asyncio.create_task(ask(loop, held("poison" + chr(POISON))))
    await until(lambda: executor.living_slots() == 1)
    compiler.let_go.set()
    assert "finite" in str((await asking).error)


async def test_unloading_ends_a_request_whose_grammar_is_not_there_yet(serve: Serve, compiler: SlowCompiler):
    executor = FakeExecutor()
    loop = await serve(executor, grammars=compiler)
    asking = asyncio.create_task(first_of(loop, held()))
    await until(lambda: executor.living_slots() == 1)
    await loop.unload()
    output = await asyncio.wait_for(asking, PATIENCE_S / 2)
    assert isinstance(output, Failed)
    assert isinstance(output.error, NotReady)
