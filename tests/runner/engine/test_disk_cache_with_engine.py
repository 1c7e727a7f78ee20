"""Engines that take up what others left on disk."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from runner.config import DialectName
from runner.engine.disk_cache import BLOCK_TOKENS, DiskCache
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import TextRequest
from tests.fakes import FakeExecutor
from tests.runner.engine.disk import LIMIT, Open, files
from tests.runner.engine.serving import GREEDY, answer, make_engine, run


def engine_on(disk: DiskCache, depth: int = 0) -> TextEngine:
    executor = FakeExecutor(depth=depth)
    return make_engine(executor, prefix_cache=PrefixCache(executor, LIMIT, disk), context_length=1000)


def test_an_engine_takes_up_what_another_one_left_and_says_the_same(opened: Open, depth: int):
    first = TextRequest("a long conversation, " * 10, GREEDY, num_predict=8)
    engine = engine_on(opened(), depth)
    (turn,) = run(engine, first)
    engine.close()
    second = TextRequest(first.prompt + turn.text + " and then?", GREEDY, num_predict=8)
    engine = engine_on(opened(), depth)
    (later,) = run(engine, second)
    assert later.done.cached_tokens == (len(first.prompt) + 7) // BLOCK_TOKENS * BLOCK_TOKENS
    assert later.text == answer(FakeExecutor(), second, context_length=1000).text
    engine.close()


def test_what_memory_holds_and_what_the_disk_holds_are_joined_in_the_middle_of_a_block(opened: Open):
    prompt = "".join(chr(97 + n % 26) + "." for n in range(150))
    engine = engine_on(opened())
    run(engine, TextRequest(prompt, GREEDY, num_predict=2))
    engine.close()
    engine = engine_on(opened())
    run(engine, TextRequest(prompt[:100] + "!", GREEDY, num_predict=1))
    longer = TextRequest(prompt + "? and what now", GREEDY, num_predict=9)
    (got,) = run(engine, longer)
    assert got.done.cached_tokens == 300 // BLOCK_TOKENS * BLOCK_TOKENS
    assert got.text == answer(FakeExecutor(), longer, context_length=1000).text
    engine.close()


@pytest.mark.process
async def test_a_restarted_child_answers_the_second_turn_from_disk(spawn_runner, tmp_path: Path):
    folder = tmp_path / "made" / "for it"
    options = {"temperature": 0, "num_predict": 6, "seed": 1}
    flags = ["--cache-dir", str(folder), "--verbose"]
    prompt = "once upon a time, the quick brown fox; " * 3

    async def turn(text: str, flags: Sequence[str]) -> tuple[str, int]:
        async with spawn_runner(dialect=DialectName.MLX, flags=flags) as child:
            await child.wait_ready()
            body = {"Prompt": text, "Options": options}
            async with child.session.post(child.url + "/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
                lines = [json.loads(line) async for line in response.content]
            assert await child.stop() == 0
        return "".join(line["Content"] for line in lines), lines[-1]["PromptEvalCachedCount"]

    said, cached = await turn(prompt, flags)
    assert cached == 0
    assert {path.suffix for path in files(folder)} == {".safetensors"}
    answer, cached = await turn(prompt + said + " go on", flags)
    assert cached >= BLOCK_TOKENS
    assert (answer, 0) == await turn(prompt + said + " go on", [])
