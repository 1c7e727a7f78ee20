import logging
import math
from collections.abc import Sequence

import mlx.core as mx
import pytest

from models.llm.base import Row
from runner.engine import reporting
from runner.engine import text as text_module
from runner.engine.sampler import RowLogprobs
from runner.engine.scheduler import MIN_CHUNK
from runner.engine.text import TextEngine
from runner.engine.types import Failed, FinishReason, Output, SamplingParams, TextDone, TextRequest
from runner.errors import BadRequest, GenerationError, PromptTooLong
from tests.fakes import BOS, EOS, ByteTokenizer, FakeModel, scripted
from tests.runner.engine.serving import Answer, answer, make_engine, run

GREEDY = SamplingParams(temperature=0)


def by_heart(prompt: str, count: int, *, limit: int = 256, keep: int = 4, shift: bool = False) -> bytes:
    """What greedy decoding must say, by the slowest way: every token from an empty cache."""
    model = FakeModel()
    tokens, said = list(prompt.encode()), []
    while len(said) < count:
        hidden = model(mx.array(tokens, dtype=mx.int32), [Row(len(tokens), model.new_cache())])
        token = int(mx.argmax(model.logits(hidden[-1:])).item())
        tokens.append(token)
        if token == EOS:
            break
        said.append(token)
        if len(tokens) >= limit:
            if not shift:
                break
            del tokens[keep : keep + (limit - keep) // 2]
    return bytes(said)


def said(tokens: bytes) -> str:
    """Their text, without the bytes at the end that began a character."""
    detokenizer = ByteTokenizer().detokenizer()
    return "".join(detokenizer.push(token) for token in tokens)


# --- what is said


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on a GPU"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_pipelined_decoding_says_what_step_by_step_recomputing_says(overlaps: bool):
    for prompt in ("a", "what is this?", "x" * 100):
        got = answer(FakeModel(), TextRequest(prompt, GREEDY, num_predict=40), overlaps=overlaps)
        assert got.text == said(by_heart(prompt, 40))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_chunks_of_a_prompt_do_not_show_in_the_answer(chunk: int):
    prompt = "the quick brown fox " * 4
    got = answer(FakeModel(), TextRequest(prompt, GREEDY, num_predict=20), prefill_chunk=chunk)
    assert got.text == said(by_heart(prompt, 20))


def test_a_character_of_several_bytes_comes_in_one_piece():
    text = "Grüße, 世界 🎉!"
    got = answer(FakeModel(text), TextRequest(scripted(0)))
    assert got.text == text
    assert "".join(got.pieces) == text
    assert all("\ufffd" not in piece for piece in got.pieces)


def test_bytes_that_are_no_character_become_replacement_characters():
    assert answer(FakeModel(b"a\xffb\xc3"), TextRequest(scripted(0))).text == "a\ufffdb"


def test_a_stop_string_ends_the_answer_before_it():
    got = answer(FakeModel("one two</s>three"), TextRequest(scripted(0), stop=("</s>", "never")))
    assert got.text == "one two"
    assert (got.done.reason, got.done.eval_tokens, got.done.stop_token) == (FinishReason.STOP, 11, False)


def test_text_that_only_began_like_a_stop_string_is_said_at_the_end():
    got = answer(FakeModel("all </"), TextRequest(scripted(0), stop=("</s>",)))
    assert (got.text, got.done.reason) == ("all </", FinishReason.STOP)
    cut = answer(FakeModel("all </s>"), TextRequest(scripted(0), stop=("</s>",), num_predict=6))
    assert (cut.text, cut.done.reason) == ("all </", FinishReason.LENGTH)


def test_a_stop_string_complete_with_the_last_allowed_token_does_not_leak():
    got = answer(FakeModel("ab</s>cd"), TextRequest(scripted(0), stop=("</s>",), num_predict=6))
    assert (got.text, got.done.reason) == ("ab", FinishReason.STOP)


def test_a_prompt_begins_with_bos_if_the_model_wants_it():
    engine = make_engine(FakeModel("yes"), adds_bos=True)
    assert engine.prepare(TextRequest("ab")).tokens == [BOS, 97, 98]
    assert engine.tokenize("ab", add_bos=False) == [97, 98]
    assert make_engine(FakeModel("yes")).prepare(TextRequest("ab")).tokens == [97, 98]


# --- seeds and company

MIXED = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(seed=2, top_k=0, top_p=0.5),
    SamplingParams(seed=3, top_k=0, top_p=0, min_p=0.2, temperature=2.0),
    SamplingParams(seed=1, typical_p=0.5, repeat_penalty=1.3),
    SamplingParams(seed=4, presence_penalty=1.0, frequency_penalty=0.5, repeat_last_n=-1),
    SamplingParams(temperature=0, repeat_penalty=1.5, repeat_last_n=8),
]


def mixed_requests() -> list[TextRequest]:
    return [
        TextRequest(f"row {n} " * (3 * n % 5 + 1), params, num_predict=10 + 7 * n % 20)
        for n, params in enumerate(MIXED)
    ]


def test_the_same_seed_says_the_same_and_another_one_something_else():
    texts = [
        answer(FakeModel(), TextRequest("tell me", SamplingParams(seed=seed, temperature=2.0), num_predict=30)).text
        for seed in (7, 7, 8, 0, 2**64 - 1)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_without_a_seed_every_answer_is_another():
    request = TextRequest("tell me", SamplingParams(temperature=2.0), num_predict=30)
    assert answer(FakeModel(), request).text != answer(FakeModel(), request).text


def test_rows_of_all_kinds_say_in_one_batch_what_they_say_alone():
    alone = [answer(FakeModel(), request).text for request in mixed_requests()]
    company = [got.text for got in run(make_engine(FakeModel(), parallel=len(MIXED)), *mixed_requests())]
    assert company == alone


def test_rows_that_join_and_leave_in_mid_flight_change_nothing_for_the_others(overlaps: bool):
    requests = mixed_requests()
    alone = [answer(FakeModel(), request) for request in requests]
    engine = make_engine(FakeModel(), parallel=3, prefill_chunk=5, overlaps=overlaps)
    outputs: dict[int, list[Output]] = {n: [] for n in range(len(requests))}
    for step in range(500):
        if step % 4 == 0 and step // 4 < len(requests):
            engine.add(step // 4, engine.prepare(requests[step // 4]))
        if step == 13:
            engine.add(99, engine.prepare(TextRequest("a passer-by " * 5, num_predict=50)))
        if step == 25:
            engine.cancel(99)
        for output in engine.step():
            if output.id != 99:
                outputs[output.id].append(output)
    got = [Answer(outputs[n]) for n in outputs]
    assert [each.text for each in got] == [each.text for each in alone]
    assert [each.done.eval_tokens for each in got] == [each.done.eval_tokens for each in alone]


def test_a_model_that_computes_when_called_is_called_once_the_tokens_before_are_told():
    model = FakeModel()
    model.computes_when_called = True
    engine = make_engine(model, parallel=2)
    requests = [TextRequest("a", GREEDY, num_predict=5), TextRequest("what is this?", GREEDY, num_predict=9)]
    for number, request in enumerate(requests):
        engine.add(number, engine.prepare(request))
    outputs: dict[int, list[Output]] = {0: [], 1: []}
    while not engine.idle:
        told, calls = engine.step(), model.steps
        for output in told:
            outputs[output.id].append(output)
        engine.proceed()
        assert model.steps == calls + (not engine.idle)
    assert [Answer(outputs[n]).text for n in outputs] == [answer(FakeModel(), request).text for request in requests]


# --- counts and ends


def test_the_stop_token_is_told_but_not_counted():
    done = answer(FakeModel("four"), TextRequest(scripted(0, "abc"))).done
    assert done.reason is FinishReason.STOP
    assert (done.prompt_tokens, done.cached_tokens, done.eval_tokens, done.stop_token) == (4, 0, 4, True)


def test_durations_begin_with_the_admission_and_add_up(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(text_module.time, "perf_counter_ns", lambda: next(clock))
    done = answer(FakeModel("four"), TextRequest(scripted(0))).done
    assert done.prompt_ns > 0
    assert done.eval_ns > 0
    assert done.prompt_ns + done.eval_ns <= next(clock)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_num_predict_is_the_most_that_is_said_and_no_step_is_wasted_beyond_it(count: int):
    model = FakeModel("a long answer")
    got = answer(model, TextRequest(scripted(0), num_predict=count))
    assert (got.text, got.done.reason) == ("a long answer"[:count], FinishReason.LENGTH)
    assert model.steps == count


@pytest.mark.parametrize("unlimited", [None, 0, -1])
def test_without_num_predict_the_context_is_filled(unlimited: int | None):
    got = answer(FakeModel("x" * 300), TextRequest(scripted(0, "abc"), num_predict=unlimited), context_length=50)
    assert (got.done.eval_tokens, got.done.reason) == (46, FinishReason.LENGTH)


def test_num_ctx_limits_prompt_and_answer_together_and_is_capped_by_the_engine():
    small = answer(FakeModel("x" * 300), TextRequest(scripted(0, "abc"), num_ctx=20), context_length=50)
    assert small.done.prompt_tokens + small.done.eval_tokens == 20
    large = answer(FakeModel("x" * 300), TextRequest(scripted(0, "abc"), num_ctx=9999), context_length=50)
    assert large.done.prompt_tokens + large.done.eval_tokens == 50


def test_a_prompt_as_long_as_the_context_is_too_long():
    engine = make_engine(FakeModel(), context_length=10, adds_bos=True)
    message = r"input length \(10 tokens\) exceeds the model's maximum context length \(10 tokens\)"
    with pytest.raises(PromptTooLong, match=message):
        engine.prepare(TextRequest("123456789"))
    assert run(engine, TextRequest("12345678", GREEDY))[0].done.eval_tokens == 1


class CountingTokenizer(ByteTokenizer):
    """Notes how much it was asked to encode."""

    encoded = 0

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        self.encoded += len(text)
        return super().encode(text, add_bos=add_bos)


def test_a_hopelessly_long_prompt_is_refused_without_encoding_it():
    tokenizer = CountingTokenizer()
    engine = TextEngine(FakeModel(), tokenizer, context_length=10, parallel=1, prefill_chunk=16)
    with pytest.raises(BadRequest, match=r"input length \(at least 1000000 tokens\) exceeds"):
        engine.prepare(TextRequest("x" * 1_000_000))
    assert tokenizer.encoded == 0


def test_of_a_hopelessly_long_prompt_only_the_ends_are_encoded_for_truncation():
    tokenizer = CountingTokenizer()
    engine = TextEngine(FakeModel(), tokenizer, context_length=10, parallel=1, prefill_chunk=16)
    prompt = "begin" + "x" * 1_000_000 + "the end"
    assert bytes(engine.prepare(TextRequest(prompt, truncate=True, num_keep=5)).tokens) == b"begin end"
    assert bytes(engine.prepare(TextRequest(prompt, truncate=True, num_keep=0)).tokens) == b"xxthe end"
    assert bytes(engine.prepare(TextRequest(prompt, truncate=True, num_keep=-1)).tokens) == b"beginxxxd"
    assert tokenizer.encoded < 3 * 100


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0, "lmnopqrst"), (4, "abcdpqrst"), (-1, "abcdefght"), (100, "abcdefght")],
)
def test_truncation_keeps_the_front_and_the_tail(keep: int, kept: str):
    engine = make_engine(FakeModel(), context_length=10)
    prepared = engine.prepare(TextRequest("abcdefghijklmnopqrst", num_keep=keep, truncate=True))
    assert bytes(prepared.tokens).decode() == kept
    assert run(engine, TextRequest("abcdefghijklmnopqrst", num_keep=keep, truncate=True))[0].done.prompt_tokens == 9


# --- context shift


@pytest.mark.parametrize("keep", [0, 4, 20])
def test_a_shifted_context_goes_on_as_if_the_rest_had_been_the_prompt(keep: int):
    prompt = "keep this in mind: "
    request = TextRequest(prompt, GREEDY, num_predict=100, num_keep=keep, num_ctx=40, shift=True)
    got = answer(FakeModel(), request)
    assert got.text == said(by_heart(prompt, 100, limit=40, keep=keep, shift=True))
    assert (got.done.eval_tokens, got.done.prompt_tokens) == (100, len(prompt))


def test_a_context_that_keeps_all_of_a_full_prompt_still_has_room_to_shift():
    prompt = "abcdefgh"
    request = TextRequest(prompt, GREEDY, num_predict=12, num_keep=-1, num_ctx=9, shift=True)
    assert answer(FakeModel(), request).text == said(by_heart(prompt, 12, limit=9, keep=7, shift=True))


def test_shifting_rows_do_not_disturb_each_other(overlaps: bool):
    requests = [TextRequest("row " * n, GREEDY, num_predict=60, num_ctx=16 + 5 * n, shift=True) for n in range(1, 5)]
    alone = [answer(FakeModel(), request).text for request in requests]
    assert [got.text for got in run(make_engine(FakeModel(), overlaps=overlaps), *requests)] == alone


def test_an_answer_that_shifts_for_ever_ends_after_ten_contexts():
    got = answer(FakeModel("x" * 5000), TextRequest(scripted(0), num_ctx=20, num_keep=1, shift=True))
    assert got.done.eval_tokens <= 200


# --- log-probabilities


def test_logprobs_are_aligned_with_the_text():
    request = TextRequest(scripted(0), GREEDY, logprobs=True, top_logprobs=3)
    got = answer(FakeModel("Grüße"), request)
    assert len(got.logprobs) == got.done.eval_tokens == 7
    assert [logprob.token for logprob in got.logprobs] == ["G", "r", "\ufffd", "\ufffd", "\ufffd", "\ufffd", "e"]
    assert [(chunk.text, len(chunk.logprobs)) for chunk in got.chunks] == [
        ("G", 1), ("r", 1), ("ü", 2), ("ß", 2), ("e", 1)
    ]  # fmt: skip
    for logprob in got.logprobs:
        assert len(logprob.top) == 3
        assert logprob.top[0].logprob == logprob.logprob > math.log(0.9)
        assert [top.logprob for top in logprob.top] == sorted((top.logprob for top in logprob.top), reverse=True)


def test_logprobs_of_text_behind_a_stop_string_are_not_told():
    got = answer(FakeModel("ab</s>cd"), TextRequest(scripted(0), GREEDY, stop=("</s>",), logprobs=True))
    assert [logprob.token for logprob in got.logprobs] == ["a", "b"]
    assert got.logprobs[0].top == ()


def test_logprobs_wait_with_the_text_that_is_held_back():
    got = answer(FakeModel("a</b"), TextRequest(scripted(0), GREEDY, stop=("</s>",), logprobs=True))
    assert [(chunk.text, len(chunk.logprobs)) for chunk in got.chunks] == [("a", 1), ("</b", 3)]


def test_the_token_of_an_unfinished_character_is_told_at_the_end():
    got = answer(FakeModel(b"a\xc3"), TextRequest(scripted(0), GREEDY, logprobs=True))
    assert got.text == "a"
    assert len(got.logprobs) == 2


def test_an_impossible_token_is_no_alternative():
    told = RowLogprobs(-0.1, ((65, -0.1), (66, -math.inf))).told(65, ByteTokenizer().piece)
    assert [top.token for top in told.top] == ["A"]


def test_only_the_row_that_asked_gets_logprobs():
    asked, other = run(make_engine(FakeModel("yes")), TextRequest(scripted(0), logprobs=True), TextRequest(scripted(0)))
    assert len(asked.logprobs) == 3
    assert other.logprobs == []


# --- bad requests


@pytest.mark.parametrize(
    "request_",
    [
        TextRequest(""),
        TextRequest("half a pair \ud800"),
        TextRequest("x", SamplingParams(temperature=math.nan)),
        TextRequest("x", SamplingParams(top_p=math.inf)),
        TextRequest("x", SamplingParams(repeat_penalty=-1.0)),
        TextRequest("x", logprobs=True, top_logprobs=21),
        TextRequest("x", logprobs=True, top_logprobs=-1),
        TextRequest("x", stop=tuple(map(str, range(20_000)))),
        TextRequest("x", num_ctx=1),
        TextRequest("xx", num_ctx=1, truncate=True),
    ],
)
def test_what_cannot_be_served_is_refused(request_: TextRequest):
    with pytest.raises(BadRequest):
        make_engine(FakeModel()).prepare(request_)


def test_nul_bytes_are_text_like_any_other():
    assert answer(FakeModel("a\0b"), TextRequest(scripted(0, "\0\0"))).text == "a\0b"


# --- failures and memory


def test_a_step_that_raises_says_what_was_said_before_and_fails_its_rows_only():
    def fail(number: int, rows: Sequence[Row]) -> None:
        if number == 4:
            raise ValueError("a bad step")

    engine = make_engine(FakeModel("abcdefgh", "fine", before_step=fail), parallel=1)
    engine.add(1, engine.prepare(TextRequest(scripted(0))))
    engine.add(2, engine.prepare(TextRequest(scripted(1))))
    outputs = [output for _ in range(3) for output in engine.step()]
    with pytest.raises(ValueError, match="a bad step"):
        engine.step()
    outputs += engine.abandon(ValueError("a bad step"))
    assert isinstance(outputs[-1], Failed)
    assert isinstance(outputs[-1].error, GenerationError)
    assert {output.id for output in outputs} == {1}
    rest: list[Output] = []
    while not engine.idle:
        rest += engine.step()
    assert Answer(rest).text == "fine"


def test_a_cache_that_cannot_be_made_fails_only_the_row_it_was_for(monkeypatch: pytest.MonkeyPatch):
    model = FakeModel("first")
    engine = make_engine(model)
    engine.add(1, engine.prepare(TextRequest(scripted(0))))
    outputs = engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "new_cache", lambda: 1 / 0)
        engine.add(2, engine.prepare(TextRequest(scripted(0))))
        with pytest.raises(ZeroDivisionError):
            engine.step()
        failed = engine.abandon(ZeroDivisionError())
    assert [output.id for output in failed] == [2]
    while not engine.idle:
        outputs += engine.step()
    assert Answer(outputs).text == "first"


@pytest.mark.parametrize(
    ("request_", "unfed"),
    [
        (TextRequest(scripted(0)), 0),
        (TextRequest(scripted(0), stop=("me",)), 0),
        (TextRequest(scripted(0), num_predict=3), 1),
    ],
    ids=["stop token", "stop string", "length"],
)
def test_what_a_cache_holds_is_known_exactly_at_the_end(request_: TextRequest, unfed: int):
    caches = []
    model = FakeModel("some text", before_step=lambda number, rows: caches.extend(row.cache[0] for row in rows))
    engine = make_engine(model)
    engine.add(1, engine.prepare(request_))
    row = engine._rows[1]
    while not engine.idle:
        engine.step()
    assert caches[0].tokens.tolist() == row.tokens[: row.fed]
    assert row.unfed == unfed


def test_after_the_last_row_nothing_is_held(overlaps: bool):
    model = FakeModel("some text")
    engine = make_engine(model, overlaps=overlaps)
    run(engine, TextRequest(scripted(0)), TextRequest("abc", num_predict=3))
    assert engine._step is None
    assert model.living_caches() == 0
    engine.add(1, engine.prepare(TextRequest(scripted(0))))
    engine.step()
    engine.close()
    assert model.living_caches() == 0


def test_cancelling_what_is_unknown_is_no_error():
    engine = make_engine(FakeModel("yes"))
    engine.cancel(5)
    assert engine.step() == []


def test_a_long_step_makes_the_next_chunk_smaller(monkeypatch: pytest.MonkeyPatch):
    now, lengths = [0], []

    def slow(number: int, rows: Sequence[Row]) -> None:
        lengths.append(rows[-1].length)
        now[0] += 100_000_000 * rows[-1].length

    monkeypatch.setattr(text_module.time, "perf_counter_ns", lambda: now[0])
    engine = make_engine(FakeModel(before_step=slow), context_length=1000, prefill_chunk=64)
    run(engine, TextRequest("x" * 300, GREEDY, num_predict=1))
    assert lengths[0] == 64
    assert set(lengths[1:-1]) == {MIN_CHUNK}
    assert sum(lengths) == 300


# --- log lines


def fields(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, object]]:
    return [record.fields for record in caplog.records if record.message == message]


def test_each_request_leaves_a_line_with_its_counts(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "runner.engine")
    answer(FakeModel("four"), TextRequest(scripted(0, "abc")))
    (line,) = fields(caplog, "completion done")
    assert (line["prompt_tokens"], line["eval_tokens"], line["reason"]) == (4, 4, "stop")


def test_long_work_is_told_of_while_it_lasts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    caplog.set_level(logging.INFO, "runner.engine")
    monkeypatch.setattr(reporting, "REPORT_NS", 0)
    answer(FakeModel("four"), TextRequest(scripted(0, "x" * 40)))
    assert [(line["done"], line["total"]) for line in fields(caplog, "prefill")] == [(32, 41)]
    assert [line["eval_tokens"] for line in fields(caplog, "decode")] == [0, 1, 2, 3, 4]


def test_the_final_counts_are_those_of_the_text():
    done = answer(FakeModel("four"), TextRequest(scripted(0))).end
    assert isinstance(done, TextDone)
    assert done.eval_tokens == len("four")
