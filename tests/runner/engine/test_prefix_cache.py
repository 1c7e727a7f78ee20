"""What rows leave to later ones: the same tokens with less work, within the limit, on real architectures."""

from pathlib import Path

import mlx.core as mx
import pytest

from models.cache import CacheType
from models.checkpoint import open_checkpoint
from models.llm import load_language_model
from models.llm.base import LanguageModel
from runner.engine import text as text_module
from runner.engine.disk_cache import DiskCache
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextDone, TextRequest
from tests.fakes import ByteTokenizer, FakeModel, scripted
from tests.runner.engine.serving import Answer, answer, make_engine, run

GREEDY = SamplingParams(temperature=0)
LIMIT = 64 << 20


def greedy(prompt: str, count: int = 8) -> TextRequest:
    return TextRequest(prompt, GREEDY, num_predict=count)


def run_on(engine: TextEngine) -> None:
    while not engine.idle:
        engine.step()
        engine.proceed()


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on a GPU"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_a_second_turn_runs_only_what_is_new_and_says_the_same(overlaps: bool):
    first = "a long conversation " * 5
    model = FakeModel()
    engine = make_engine(model, prefix_cache=PrefixCache(LIMIT), overlaps=overlaps)
    (turn,) = run(engine, greedy(first))
    second = first + turn.text + " and then?"
    (later,) = run(engine, greedy(second))
    assert later.done.cached_tokens >= len(first)
    assert later.done.prompt_tokens == len(second.encode())
    assert later.text == answer(FakeModel(), greedy(second)).text


def test_prompts_that_share_their_beginning_share_its_keys_while_the_first_still_runs():
    system = "you are a helpful machine. " * 12
    lengths = []
    model = FakeModel(before_step=lambda _, rows: lengths.extend(row.length for row in rows))
    engine = make_engine(model, context_length=2000, parallel=1, prefix_cache=PrefixCache(LIMIT))
    answers = run(engine, greedy(system + "one", 30), greedy(system + "two", 30))
    assert [done.done.cached_tokens for done in answers] == [0, len(system)]
    alone = [answer(FakeModel(), greedy(system + word, 30), context_length=2000) for word in ("one", "two")]
    assert [got.text for got in answers] == [got.text for got in alone]


def test_a_cancelled_row_leaves_what_it_had_read(overlaps: bool):
    engine = make_engine(FakeModel(), prefix_cache=PrefixCache(LIMIT), overlaps=overlaps)
    engine.add(1, engine.prepare(greedy("x" * 100)))
    engine.step()
    engine.proceed()
    engine.step()
    engine.cancel(1)
    engine.step()
    engine.proceed()
    (again,) = run(engine, greedy("x" * 100 + "y"))
    assert again.done.cached_tokens >= 32


def test_a_repeated_request_runs_its_last_chunk_again_as_it_was():
    lengths: list[int] = []
    model = FakeModel(before_step=lambda _, rows: lengths.append(rows[-1].length))
    engine = make_engine(model, prefill_chunk=16, prefix_cache=PrefixCache(LIMIT))
    request = greedy("p" * 40, 2)
    (first,) = run(engine, request)
    assert lengths[:3] == [16, 16, 8]
    lengths.clear()
    (second,) = run(engine, request)
    assert lengths[0] == 8
    assert (first.text, second.done.cached_tokens) == (second.text, 32)


def test_a_row_that_failed_leaves_nothing():
    cache = PrefixCache(LIMIT)
    engine = make_engine(FakeModel(), prefix_cache=cache)
    (failed,) = run(engine, greedy("fine so far \x0e"))
    assert "not finite" in str(failed.error)
    assert cache.nbytes == 0


def test_a_step_that_raises_frees_the_cache():
    def fail(number: int, rows: object) -> None:
        if number == 30:
            raise MemoryError("no more")

    cache = PrefixCache(LIMIT)
    engine = make_engine(FakeModel(before_step=fail), prefix_cache=cache)
    run(engine, greedy("x" * 100))
    assert cache.nbytes > 0
    engine.add(9, engine.prepare(greedy("y" * 100, 100)))
    with pytest.raises(MemoryError):
        run_on(engine)
    assert [str(output.error) for output in engine.abandon(MemoryError("no more")) if not isinstance(output, TextDone)]
    assert cache.nbytes == 0
    assert run(engine, greedy("z"))[0].done.eval_tokens > 0


def test_it_never_holds_more_than_its_limit_and_serves_on():
    cache = PrefixCache(2000)
    engine = make_engine(FakeModel("yes"), prefix_cache=cache)
    for number in range(40):
        (got,) = run(engine, TextRequest(f"{number} " * 20 + scripted(0)))
        assert got.text == "yes"
        assert cache.nbytes <= 2000
    assert cache.nbytes > 0


def test_status_says_what_it_holds():
    engine = make_engine(FakeModel("yes"), prefix_cache=PrefixCache(LIMIT))
    run(engine, TextRequest("abc" + scripted(0)))
    assert engine.status().prefix_cache_bytes > 0


@pytest.fixture(scope="module", params=["llama_gqa", "mistral_window", "qwen3"])
def model(request: pytest.FixtureRequest, parity: Path) -> LanguageModel:
    return load_language_model(open_checkpoint(str(parity / request.param), store=parity))


def test_real_models_say_the_same_with_and_without_it(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    # The fixture's sliding window is short: rows have to be stored before anything slides out of it.
    monkeypatch.setattr(text_module, "STORE_TOKENS", 4)

    def talk(prefix_cache: PrefixCache | None) -> list[tuple[Answer, str]]:
        engine = TextEngine(
            model, ByteTokenizer(), context_length=256, parallel=2, prefill_chunk=8, prefix_cache=prefix_cache
        )
        prompt, turns = "once upon a time there was", []
        for question in ("! and then?", "? really", ". stop", ""):
            prompt += question
            got = run(engine, greedy(prompt, 12), greedy(prompt[:20] + "!?", 12))
            turns += [(one, prompt) for one in got]
            prompt += got[0].text
        return turns

    cache = PrefixCache(LIMIT)
    with_it, without = talk(cache), talk(None)
    assert [(got.text, prompt) for got, prompt in with_it] == [(got.text, prompt) for got, prompt in without]
    assert sum(got.done.cached_tokens for got, _ in with_it) > 100
    assert sum(got.done.cached_tokens for got, _ in without) == 0


def test_a_row_of_which_something_slid_out_of_the_window_is_not_stored(parity: Path):
    model = load_language_model(open_checkpoint(str(parity / "mistral_window"), store=parity))
    cache = PrefixCache(LIMIT)
    engine = TextEngine(model, ByteTokenizer(), context_length=256, parallel=1, prefill_chunk=4, prefix_cache=cache)
    run(engine, greedy("0123456789" * 12, 4))
    assert cache.nbytes == 0
    run(engine, greedy("ab", 1))
    assert cache.nbytes > 0


def test_storing_does_not_make_the_next_step_copy_a_rows_whole_cache(parity: Path):
    model = load_language_model(open_checkpoint(str(parity / "llama_gqa"), store=parity))
    engine = TextEngine(
        model, ByteTokenizer(), context_length=2000, parallel=1, prefill_chunk=64, prefix_cache=PrefixCache(LIMIT)
    )
    engine.add(1, engine.prepare(greedy("x" * 1500, 200)))
    while engine._rows[1].generated < 50:
        engine.step()
        engine.proceed()
    held = sum(layer.nbytes for layer in engine._rows[1].cache)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        engine.step()
        engine.proceed()
    assert mx.get_peak_memory() - before < held


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
def test_quantised_rows_leave_packed_segments_and_say_the_same(wide_llama: Path, tmp_path: Path, cache_type: CacheType):
    prompt = "once upon a time there was a cache " * 6
    sizes = {}

    def say(kind: CacheType, cached: bool) -> list[str]:
        model = load_language_model(open_checkpoint(str(wide_llama), store=tmp_path), cache_type=kind)
        disk = DiskCache(tmp_path, kind, limit_bytes=LIMIT) if cached else None
        cache = PrefixCache(LIMIT, disk) if cached else None
        engine = TextEngine(
            model, ByteTokenizer(), context_length=600, parallel=2, prefill_chunk=64, prefix_cache=cache
        )
        texts = [got.text for more in ("", "and then", "and") for got in run(engine, greedy(prompt + more, 12))]
        if cache is not None:
            sizes[kind] = cache.nbytes
        engine.close()
        return texts

    assert say(cache_type, cached=True) == say(cache_type, cached=False)
    # A second engine has them from the disk.
    assert say(cache_type, cached=True) == say(cache_type, cached=False)
    say("f16", cached=True)
    assert sizes[cache_type] < sizes["f16"] / {"q8_0": 3, "q4_0": 5}[cache_type]
