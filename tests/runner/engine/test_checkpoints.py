"""The prefix cache of models with recurrent layers, which can be taken up only where a checkpoint was taken."""

import random
from pathlib import Path

import pytest

from models.executors.base import Executor, Step
from runner.engine.disk_cache import BLOCK_TOKENS, DiskCache
from runner.engine.prefix_cache import ALIGNMENT, CHECKPOINT_TOKENS, PrefixCache, rest_point
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextRequest
from tests.fakes import BYTES_PER_TOKEN, CHECKPOINT_BYTES, ByteTokenizer, FakeExecutor, scripted
from tests.runner.engine.serving import answer, make_engine, real_executor, run

GREEDY = SamplingParams(temperature=0)
LIMIT = 64 << 20
CONTEXT = 6000


def greedy(prompt: str, count: int = 8) -> TextRequest:
    return TextRequest(prompt, GREEDY, num_predict=count)


def caching(depth: int = 0, limit_bytes: int = LIMIT, disk: DiskCache | None = None, **options) -> TextEngine:
    scripts, before_step = options.pop("scripts", ()), options.pop("before_step", None)
    executor = FakeExecutor(*scripts, depth=depth, recurrent=True, before_step=before_step)
    options = {"context_length": CONTEXT, "prefill_chunk": 64} | options
    return make_engine(executor, prefix_cache=PrefixCache(executor, limit_bytes, disk), **options)


def alone(request: TextRequest) -> str:
    return answer(FakeExecutor(), request, context_length=CONTEXT).text


def letters(count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=count))


def test_a_second_turn_goes_on_where_the_first_answer_ended(depth: int):
    engine, first = caching(depth, scripts=("a fine answer", "another")), letters(500) + scripted(0)
    (turn,) = run(engine, greedy(first, 60))
    (later,) = run(engine, greedy(first + turn.text + " and then?" + scripted(1), 60))
    # Where steps are begun ahead the row was fed its end already, which a chat's next turn has, and this one has not.
    assert later.done.cached_tokens == (rest_point(len(first)) if depth else len(first) + len(turn.text))
    assert (turn.text, later.text) == ("a fine answer", "another")


def test_a_turn_that_leaves_the_answer_out_goes_on_near_the_end_of_the_prompt(depth: int):
    engine, first = caching(depth), letters(500)
    run(engine, greedy(first))
    second = greedy(first[:-5] + "another end, and more")
    (later,) = run(engine, second)
    assert later.done.cached_tokens == rest_point(500) == 448
    assert later.text == alone(second)


def test_where_two_prompts_part_the_third_can_go_on(depth: int):
    engine, system = caching(depth), letters(300)
    cached = []
    for number in range(3):
        request = greedy(system + letters(200, seed=number + 1))
        (got,) = run(engine, request)
        cached.append(got.done.cached_tokens)
        assert got.text == alone(request)
    assert cached == [0, 0, 300 // ALIGNMENT * ALIGNMENT]


def test_every_so_many_tokens_of_a_long_prompt_can_be_gone_on_from(depth: int):
    engine, prompt = caching(depth), letters(4000)
    run(engine, greedy(prompt))
    request = greedy(prompt[:2500] + "!")
    (got,) = run(engine, request)
    assert got.done.cached_tokens == 2 * CHECKPOINT_TOKENS
    assert got.text == alone(request)


def test_a_long_answer_leaves_checkpoints_as_it_grows(depth: int):
    executor = FakeExecutor(letters(3000, seed=5), depth=depth, recurrent=True)
    engine = make_engine(executor, prefix_cache=PrefixCache(executor, LIMIT), context_length=CONTEXT)
    (got,) = run(engine, TextRequest(scripted(0), GREEDY, num_predict=2600))
    (again,) = run(engine, TextRequest(scripted(0) + got.text[:1500] + "no", GREEDY, num_predict=3))
    assert 1024 <= again.done.cached_tokens <= 1200


def test_a_repeated_prompt_runs_its_end_again_as_it_was(depth: int):
    lengths: list[int] = []
    engine = caching(depth, before_step=lambda _, step: lengths.append(step.rows[-1].length))
    request = greedy(letters(300), 1)
    (first,) = run(engine, request)
    assert lengths[:5] == [64, 64, 64, 64, 44]
    lengths.clear()
    (second,) = run(engine, request)
    assert lengths[0] == 44
    assert (first.text, second.done.cached_tokens) == (second.text, 256)


def test_prefill_pauses_for_a_checkpoint_and_for_nothing_else(depth: int):
    lengths: list[int] = []
    engine = caching(
        depth, before_step=lambda _, step: lengths.append(step.rows[-1].length), prefill_chunk=512, context_length=2000
    )
    run(engine, greedy(letters(1000), 1))
    assert lengths[:3] == [512, 448, 40]


def test_others_go_on_decoding_while_a_prompt_pauses(depth: int):
    engine = caching(depth)
    requests = [greedy("short", 60), greedy(letters(700), 5), greedy(letters(700) + "?", 5)]
    assert [got.text for got in run(engine, *requests)] == [alone(request) for request in requests]


def test_what_checkpoints_take_is_counted_and_kept_within_the_limit():
    engine = caching()
    run(engine, greedy(letters(200), 1))
    # One near the prompt's end, one where the row ended.
    assert engine.status().prefix_cache_bytes == 200 * BYTES_PER_TOKEN + 2 * CHECKPOINT_BYTES
    small = caching(limit_bytes=4000)
    for number in range(30):
        request = greedy(letters(300, seed=number % 7), 4)
        assert run(small, request)[0].text == alone(request)
        assert 0 < small.status().prefix_cache_bytes <= 4000


def test_a_row_cancelled_in_its_prompt_leaves_what_it_had_read(depth: int):
    engine = caching(depth)
    engine.add(1, engine.prepare(greedy(letters(1000))))
    for _ in range(6):
        engine.step()
        engine.proceed()
    engine.cancel(1)
    engine.step()
    engine.proceed()
    (got,) = run(engine, greedy(letters(1000)))
    assert got.done.cached_tokens >= 192


def test_a_shifted_context_goes_on_as_without_a_cache(depth: int):
    prompt = letters(150)
    request = TextRequest(prompt, GREEDY, num_predict=200, num_keep=10)
    options = {"context_length": 200, "prefill_chunk": 16}
    engine = caching(depth, **options)
    run(engine, request)
    assert run(engine, request)[0].text == answer(FakeExecutor(), request, **options).text


def opened(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path, "model", limit_bytes=LIMIT)


def test_a_new_process_goes_on_at_the_last_checkpoint_that_lies_on_disk(depth: int, tmp_path: Path):
    prompt = letters(700)
    engine = caching(depth, disk=opened(tmp_path))
    run(engine, greedy(prompt))
    engine.close()
    engine = caching(depth, disk=opened(tmp_path))
    request = greedy(prompt + " and then?")
    (got,) = run(engine, request)
    assert got.done.cached_tokens == rest_point(700)
    assert got.text == alone(request)
    engine.close()


def test_a_checkpoint_on_disk_whose_blocks_are_gone_is_of_no_use(tmp_path: Path):
    prompt = letters(300)
    engine = caching(disk=opened(tmp_path))
    run(engine, greedy(prompt))
    engine.close()
    largest = sorted((path for path in tmp_path.glob("*/*")), key=lambda path: path.stat().st_mtime_ns)
    largest[0].unlink()
    engine = caching(disk=opened(tmp_path))
    (got,) = run(engine, greedy(prompt + "?"))
    assert got.text == alone(greedy(prompt + "?"))
    assert got.done.cached_tokens < rest_point(300)
    engine.close()


def test_a_place_that_memory_knows_gets_its_checkpoint_from_the_disk(tmp_path: Path):
    system = letters(BLOCK_TOKENS * 4)
    engine = caching(disk=opened(tmp_path))
    run(engine, greedy(system + letters(100, 1)), greedy(system + letters(100, 2)))
    run(engine, greedy(system + letters(100, 3)))
    engine.close()
    engine = caching(disk=opened(tmp_path), limit_bytes=LIMIT)
    request = greedy(system + "!")
    (got,) = run(engine, request)
    assert got.done.cached_tokens == len(system)
    assert got.text == alone(request)
    engine.close()


def test_steps_hold_the_same_rows_whatever_the_cache_does(depth: int):
    """A pause is a shorter chunk, not a step without one."""
    steps: list[Step] = []
    engine = caching(depth, before_step=lambda _, step: steps.append(step))
    run(engine, greedy(letters(700), 1))
    assert all(step.rows for step in steps)


@pytest.mark.parametrize("seed", range(3))
def test_many_requests_with_shared_beginnings_say_what_they_say_without_a_cache(depth: int, seed: int):
    generator = random.Random(seed)
    engine, texts = caching(depth, limit_bytes=30_000), [letters(400, seed=9)]
    for _ in range(40):
        base = generator.choice(texts)
        prompt = base[: generator.randint(1, len(base))] + letters(generator.randint(1, 90), generator.randint(0, 99))
        requests = [greedy(prompt, 5), greedy(generator.choice(texts) + "?", 5)]
        answers = run(engine, *requests)
        assert [got.text for got in answers] == [alone(request) for request in requests]
        texts.append(prompt + answers[0].text)


REAL = [(name, kind) for name in ("lfm2", "qwen3_next", "mamba2") for kind in ("onnx", "mlx ahead")]


@pytest.fixture(scope="module", params=REAL, ids=" on ".join)
def real(request: pytest.FixtureRequest, parity: Path) -> Executor:
    name, kind = request.param
    return real_executor(parity / name, kind, slots=3)


def test_a_real_model_says_the_same_through_many_requests_that_share_beginnings(real: Executor, tmp_path: Path):
    """In memory and on disk, with drafts and without, under a limit that has checkpoints go."""
    settings = {"context_length": 448, "parallel": 3, "prefill_chunk": 32}
    generator, texts, cached = random.Random(3), [letters(200, seed=9)], 0
    memory = real.memory_bytes()
    plain = TextEngine(real, ByteTokenizer(), **settings)
    limit = 40 * real.state_nbytes(200)
    for number in range(8):
        disk = DiskCache(tmp_path, "model", limit_bytes=LIMIT)
        caching = TextEngine(
            real, ByteTokenizer(), prefix_cache=PrefixCache(real, limit, disk), draft=3 * (number % 2), **settings
        )
        for _ in range(4):
            prompts = [generator.choice(texts)[:250] + letters(generator.randint(1, 60), number) for _ in range(3)]
            requests = [greedy(prompt, 8) for prompt in prompts]
            answers = run(caching, *requests)
            assert [got.text for got in answers] == [got.text for got in run(plain, *requests)]
            cached += sum(got.done.cached_tokens for got in answers)
            assert caching.status().prefix_cache_bytes <= limit
            texts.append(prompts[0] + answers[0].text)
        disk.close()
    assert cached > 1000
    assert real.memory_bytes() == memory
