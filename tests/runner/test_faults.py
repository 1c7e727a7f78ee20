"""Faults of many requests at once: those who leave take everything of theirs with them and touch nobody else's."""

import asyncio
import random
from collections.abc import Iterable
from contextlib import AsyncExitStack, aclosing
from itertools import count

import pytest

from runner.config import DialectName
from runner.engine.prefix_cache import PrefixCache
from runner.engine.types import Failed, Output, SamplingParams, TextDone, TextRequest
from runner.parent import Child
from tests.fakes import FakeExecutor
from tests.runner.engine.serving import Answer, make_engine
from tests.runner.engine.serving import answer as run_alone

ABORTS = 200
AT_ONCE = 8
"""Of those who leave, so that some are still waiting for a row when they do."""
ROWS = 4
SURVIVORS = ("once upon a time", "the quick brown fox", "to be or not to be, that is")
SEEDED = {"temperature": 0.9, "seed": 7, "num_predict": 150}
ENDLESS = {"temperature": 0, "num_predict": -1, "num_ctx": 10_000_000}
CACHE_BYTES = 200_000
SLACK_BYTES = 4 << 20
"""A hundred rows that were kept would be several times that."""
FLAGS = (f"--parallel={ROWS}", "--context=100000", "--prefill-chunk=32", f"--cache-bytes={CACHE_BYTES}")


async def answer(child: Child, prompt: str) -> str:
    return "".join([piece.content async for piece in child.complete(prompt, SEEDED)])


async def leave(child: Child, rng: random.Random, number: int) -> None:
    """Go away at some moment between connecting and the last token."""
    prompt = f"{number} " * rng.randrange(1, 60)
    pieces = rng.choice((None, None, 0, 1, 3, 10))
    if pieces is None:
        # In the body, the queue or the prompt: whichever that moment falls into.
        task = asyncio.create_task(answer(child, prompt))
        for _ in range(rng.randrange(40)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        return
    async with aclosing(child.complete(prompt, {"temperature": 0, "num_predict": 400, "num_ctx": 512})) as stream:
        for _ in range(pieces):
            if await anext(stream, None) is None:
                return


async def held(child: Child) -> int:
    """The bytes that MLX holds while every row is ours, which also shows that nobody else has one."""
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(aclosing(child.complete("a", ENDLESS))) for _ in range(ROWS)]
        async with asyncio.timeout(60):
            firsts = await asyncio.gather(*(anext(stream) for stream in streams))
        assert not any(piece.done for piece in firsts)
        status = await child.health()
        return status["Memory"]


async def churn(child: Child, numbers: Iterable[int]) -> None:
    """Everyone of these numbers comes and leaves, eight at a time."""
    left = iter(numbers)

    async def visitor() -> None:
        for number in left:
            await leave(child, random.Random(number), number)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(visitor())


@pytest.mark.process
async def test_two_hundred_who_leave_at_random_moments_leave_nothing_behind(spawn_runner, roomy_llama):
    async with spawn_runner(roomy_llama, dialect=DialectName.MLX, flags=FLAGS) as child:
        await child.wait_ready()
        undisturbed = await asyncio.gather(*(answer(child, prompt) for prompt in SURVIVORS))
        assert all(undisturbed)

        # The buffers that MLX keeps for reuse reach their number in the first half; from there on nothing may be added.
        await churn(child, range(ABORTS // 2))
        baseline = await held(child)
        leaving = asyncio.create_task(churn(child, range(ABORTS // 2, ABORTS)))
        answered = 0
        while not leaving.done() or answered == 0:
            for prompt, text in zip(SURVIVORS, undisturbed, strict=True):
                assert await answer(child, prompt) == text
                answered += 1
        await leaving
        assert await held(child) < baseline + SLACK_BYTES


@pytest.mark.parametrize("depth", [0, 1])
def test_rows_cancelled_at_any_step_leave_only_what_the_prefix_cache_may_hold(depth: int):
    rng = random.Random(2)
    survivors = [TextRequest(f"survivor {number}", SamplingParams(seed=number), num_predict=60) for number in range(5)]
    alone = [run_alone(FakeExecutor(), request).text for request in survivors]
    executor = FakeExecutor(depth=depth)
    prefixes = PrefixCache(executor, 3000)
    engine = make_engine(executor, parallel=6, prefill_chunk=8, prefix_cache=prefixes)
    outputs: dict[int, list[Output]] = {}
    numbers, living, aborted = count(len(survivors)), set[int](), 0
    while aborted < ABORTS or not engine.idle:
        if aborted < ABORTS and len(living) < AT_ONCE:
            number = next(numbers)
            outputs[number] = []
            engine.add(number, engine.prepare(TextRequest("x" * rng.randrange(1, 40), num_predict=200)))
            living.add(number)
        if len(outputs) % 20 == 1 and (waiting := [n for n in range(len(survivors)) if n not in outputs]):
            outputs[waiting[0]] = []
            engine.add(waiting[0], engine.prepare(survivors[waiting[0]]))
        for phase in (engine.step, engine.proceed):
            for output in phase() or ():
                outputs[output.id].append(output)
                if isinstance(output, TextDone | Failed):
                    living.discard(output.id)
            if living and (aborted >= ABORTS or rng.random() < 0.4):
                leaving = rng.choice(sorted(living))
                engine.cancel(leaving)
                living.discard(leaving)
                aborted += 1
    # What the last to leave had read is stored only now.
    engine.step()
    engine.proceed()
    assert [Answer(outputs[number]).text for number in range(len(survivors))] == alone
    status = engine.status()
    assert (status.running, status.waiting) == (0, 0)
    assert (executor.living_slots(), executor.living_steps()) == (0, 0)
    assert 0 < prefixes.nbytes <= 3000
    prefixes.clear()
    assert prefixes.nbytes == 0
