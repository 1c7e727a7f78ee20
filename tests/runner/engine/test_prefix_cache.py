"""What rows leave to later ones: the same tokens with less work, within the limit, on real architectures."""

from pathlib import Path

import pytest

from models.executors.base import Executor, Step
from runner.engine import row_store
from runner.engine.disk_cache import DiskCache
from runner.engine.prefix_cache import STORE_TOKENS, PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import Failed, SamplingParams, TextDone, TextRequest
from tests.fakes import ByteTokenizer, FakeExecutor, scripted
from tests.parity.executors import EXECUTORS, load
from tests.runner.engine.serving import Answer, answer, make_engine, real_executor, run, to_the_end

GREEDY = SamplingParams(temperature=0)
LIMIT = 64 << 20


def greedy(prompt: str, count: int = 8) -> TextRequest:
    return TextRequest(prompt, GREEDY, num_predict=count)


def caching(executor: FakeExecutor, limit_bytes: int = LIMIT, **options) -> TextEngine:
    return make_engine(executor, prefix_cache=PrefixCache(executor, limit_bytes), **options)


def test_a_second_turn_runs_only_what_is_new_and_says_the_same(depth: int):
    first = "a long conversation " * 5
    engine = caching(FakeExecutor(depth=depth))
    (turn,) = run(engine, greedy(first))
    second = first + turn.text + " and then?"
    (later,) = run(engine, greedy(second))
    assert later.done.cached_tokens >= len(first)
    assert later.done.prompt_tokens == len(second.encode())
    assert later.text == answer(FakeExecutor(), greedy(second)).text


def test_prompts_that_share_their_beginning_share_its_state(depth: int):
    system = "you are a helpful machine. " * 12
    engine = caching(FakeExecutor(depth=depth), context_length=2000, parallel=1)
    answers = run(engine, greedy(system + "one", 30), greedy(system + "two", 30))
    assert [done.done.cached_tokens for done in answers] == [0, len(system)]
    alone = [answer(FakeExecutor(), greedy(system + word, 30), context_length=2000) for word in ("one", "two")]
    assert [got.text for got in answers] == [got.text for got in alone]


def test_what_a_long_row_has_read_is_there_for_others_while_it_still_runs(depth: int):
    engine = caching(FakeExecutor(depth=depth), context_length=2000)
    engine.add(1, engine.prepare(greedy("x" * 1000, 50)))
    for _ in range(40):
        engine.step()
        engine.proceed()
    engine.add(2, engine.prepare(greedy("x" * 600 + "y", 5)))
    (done,) = [output for output in to_the_end(engine) if isinstance(output, TextDone) and output.id == 2]
    assert done.cached_tokens >= 512


def test_a_cancelled_row_leaves_what_it_had_read(depth: int):
    executor = FakeExecutor(depth=depth)
    engine = caching(executor)
    engine.add(1, engine.prepare(greedy("x" * 100)))
    engine.step()
    engine.proceed()
    engine.step()
    engine.cancel(1)
    engine.step()
    engine.proceed()
    assert executor.living_slots() == 0
    (again,) = run(engine, greedy("x" * 100 + "y"))
    assert again.done.cached_tokens >= 32


def test_a_repeated_request_runs_its_last_chunk_again_as_it_was():
    lengths: list[int] = []
    engine = caching(FakeExecutor(before_step=lambda _, step: lengths.append(step.rows[-1].length)), prefill_chunk=16)
    request = greedy("p" * 40, 2)
    (first,) = run(engine, request)
    assert lengths[:3] == [16, 16, 8]
    lengths.clear()
    (second,) = run(engine, request)
    assert lengths[0] == 8
    assert (first.text, second.done.cached_tokens) == (second.text, 32)


def test_a_row_that_failed_leaves_nothing():
    engine = caching(FakeExecutor())
    (failed,) = run(engine, greedy("fine so far \x0e"))
    assert "not finite" in str(failed.error)
    assert engine.status().prefix_cache_bytes == 0


def test_a_step_that_raises_frees_the_cache(depth: int):
    def fail(number: int, step: Step) -> None:
        if number == 30:
            raise MemoryError("no more")

    executor = FakeExecutor(depth=depth, before_step=fail)
    engine = caching(executor)
    run(engine, greedy("x" * 100))
    assert engine.status().prefix_cache_bytes > 0
    engine.add(9, engine.prepare(greedy("y" * 100, 100)))
    with pytest.raises(MemoryError):
        to_the_end(engine)
    assert isinstance(engine.abandon(MemoryError("no more"))[-1], Failed)
    assert engine.status().prefix_cache_bytes == 0
    assert executor.living_slots() == 0
    assert run(engine, greedy("z"))[0].done.eval_tokens > 0


def test_storing_that_raises_costs_nobody_his_row(depth: int, monkeypatch: pytest.MonkeyPatch):
    executor = FakeExecutor("a long enough text", depth=depth)
    engine = caching(executor)
    for number in (1, 2):
        engine.add(number, engine.prepare(TextRequest(scripted(0, "x" * number), GREEDY)))
    outputs = [*engine.step()]
    engine.proceed()
    with monkeypatch.context() as patch:
        patch.setattr(executor, "segment", lambda *_: 1 / 0)
        engine.cancel(1)
        outputs += engine.step()
        with pytest.raises(ZeroDivisionError):
            engine.proceed()
        assert engine.abandon(ZeroDivisionError()) == []
    assert executor.living_slots() == 1
    outputs += to_the_end(engine)
    assert Answer([output for output in outputs if output.id == 2]).text == "a long enough text"


def test_it_never_holds_more_than_its_limit_and_serves_on():
    engine = caching(FakeExecutor("yes"), 2000)
    for number in range(40):
        (got,) = run(engine, TextRequest(f"{number} " * 20 + scripted(0)))
        assert got.text == "yes"
        assert engine.status().prefix_cache_bytes <= 2000
    assert engine.status().prefix_cache_bytes > 0


def test_a_row_of_which_something_slid_out_of_a_window_is_not_stored(depth: int):
    engine = caching(FakeExecutor(depth=depth, window=64), context_length=1000)
    run(engine, greedy("0123456789" * 12, 4))
    assert engine.status().prefix_cache_bytes == 0
    run(engine, greedy("ab", 2))
    assert engine.status().prefix_cache_bytes > 0


def test_a_row_that_grows_is_stored_before_anything_slides_out_of_a_usual_window(depth: int):
    engine = caching(FakeExecutor(depth=depth, window=STORE_TOKENS + 16), context_length=2000)
    (first,) = run(engine, greedy("0123456789" * 90, 4))
    (second,) = run(engine, greedy("0123456789" * 90 + "? and", 4))
    assert (first.done.cached_tokens, second.done.cached_tokens) == (0, 900)


REAL = [(name, kind) for name in ("llama_gqa", "mistral_window", "qwen3", "lfm2") for kind in ("onnx", "mlx ahead")]


@pytest.fixture(scope="module", params=REAL, ids=" on ".join)
def real(request: pytest.FixtureRequest, parity: Path) -> Executor:
    name, kind = request.param
    return real_executor(parity / name, kind, slots=2)


def test_real_models_say_the_same_with_and_without_it(real: Executor, monkeypatch: pytest.MonkeyPatch):
    # The fixture's sliding window is short: rows have to be stored before anything slides out of it.
    monkeypatch.setattr(row_store, "STORE_TOKENS", 4)

    def talk(prefix_cache: PrefixCache | None) -> list[tuple[Answer, str]]:
        engine = TextEngine(
            real, ByteTokenizer(), context_length=256, parallel=2, prefill_chunk=8, prefix_cache=prefix_cache
        )
        prompt, turns = "once upon a time there was", []
        for question in ("! and then?", "? really", ". stop", ""):
            prompt += question
            got = run(engine, greedy(prompt, 12), greedy(prompt[:20] + "!?", 12))
            turns += [(one, prompt) for one in got]
            prompt += got[0].text
        return turns

    with_it, without = talk(PrefixCache(real, LIMIT)), talk(None)
    assert [(got.text, prompt) for got, prompt in with_it] == [(got.text, prompt) for got, prompt in without]
    # Recurrent rows are taken up where others ended, not wherever they part.
    assert sum(got.done.cached_tokens for got, _ in with_it) > (50 if real.needs_checkpoints else 100)
    assert sum(got.done.cached_tokens for got, _ in without) == 0


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("kind", EXECUTORS)
def test_quantised_rows_leave_packed_segments_and_say_the_same(
    wide_llama: Path, tmp_path: Path, cache_type: str, kind: str
):
    prompt = "once upon a time there was a cache " * 6
    sizes = {}

    def say(cache_type: str, *, cached: bool) -> list[str]:
        executor = load(wide_llama, kind, cache_type=cache_type, slots=2)
        disk = DiskCache(tmp_path, cache_type, limit_bytes=LIMIT) if cached else None
        cache = PrefixCache(executor, LIMIT, disk) if cached else None
        engine = TextEngine(
            executor, ByteTokenizer(), context_length=400, parallel=2, prefill_chunk=64, prefix_cache=cache
        )
        texts = [got.text for more in ("", "and then", "and") for got in run(engine, greedy(prompt + more, 12))]
        if cache is not None:
            sizes[cache_type] = cache.nbytes
        engine.close()
        return texts

    assert say(cache_type, cached=True) == say(cache_type, cached=False)
    # A second engine has them from the disk.
    assert say(cache_type, cached=True) == say(cache_type, cached=False)
    say("f16", cached=True)
    assert sizes[cache_type] < sizes["f16"] / {"q8_0": 2, "q4_0": 3}[cache_type]
