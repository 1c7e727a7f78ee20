import time
from collections import Counter
from dataclasses import replace

import pytest

from runner.engine.text import TextEngine
from runner.engine.types import FinishReason, Output, SamplingParams, TextRequest
from runner.errors import BadRequest, PromptTooLong
from tests.fakes import BOS, EOS, ByteTokenizer, FakeExecutor, hidden_of, scripted
from tests.runner.engine.serving import GREEDY, Answer, answer, make_engine, run


def by_heart(prompt: str, count: int, *, limit: int = 256, keep: int = 4, shift: bool = False) -> bytes:
    """What greedy decoding must say, by the slowest way: every token from nothing."""
    executor = FakeExecutor()
    tokens, said = list(prompt.encode()), []
    while len(said) < count:
        token = int(executor.logits_of(hidden_of(tokens)[-1:]).argmax())
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


def test_pipelined_decoding_says_what_step_by_step_recomputing_says(depth: int):
    for prompt in ("a", "what is this?", "x" * 100):
        got = answer(FakeExecutor(depth=depth), TextRequest(prompt, GREEDY, num_predict=40))
        assert got.text == said(by_heart(prompt, 40))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_chunks_of_a_prompt_do_not_show_in_the_answer(chunk: int, depth: int):
    prompt = "the quick brown fox " * 4
    got = answer(FakeExecutor(depth=depth), TextRequest(prompt, GREEDY, num_predict=20), prefill_chunk=chunk)
    assert got.text == said(by_heart(prompt, 20))


def test_a_character_of_several_bytes_comes_in_one_piece():
    text = "Grüße, 世界 🎉!"
    got = answer(FakeExecutor(text), TextRequest(scripted(0)))
    assert got.text == text
    assert "".join(got.pieces) == text
    assert all("\ufffd" not in piece for piece in got.pieces)


def test_bytes_that_are_no_character_become_replacement_characters():
    assert answer(FakeExecutor(b"a\xffb\xc3"), TextRequest(scripted(0))).text == "a\ufffdb"


def test_a_stop_string_ends_the_answer_before_it():
    got = answer(FakeExecutor("one two</s>three"), TextRequest(scripted(0), stop=("</s>", "never")))
    assert got.text == "one two"
    assert (got.done.reason, got.done.eval_tokens, got.done.stop_token) == (FinishReason.STOP, 11, False)


def test_text_that_only_began_like_a_stop_string_is_said_at_the_end():
    got = answer(FakeExecutor("all </"), TextRequest(scripted(0), stop=("</s>",)))
    assert (got.text, got.done.reason) == ("all </", FinishReason.STOP)
    cut = answer(FakeExecutor("all </s>"), TextRequest(scripted(0), stop=("</s>",), num_predict=6))
    assert (cut.text, cut.done.reason) == ("all </", FinishReason.LENGTH)


def test_a_stop_string_complete_with_the_last_allowed_token_does_not_leak():
    got = answer(FakeExecutor("ab</s>cd"), TextRequest(scripted(0), stop=("</s>",), num_predict=6))
    assert (got.text, got.done.reason) == ("ab", FinishReason.STOP)


def test_a_prompt_begins_with_bos_if_the_model_wants_it():
    engine = make_engine(FakeExecutor("yes"), adds_bos=True)
    assert engine.prepare(TextRequest("ab")).tokens == [BOS, 97, 98]
    assert engine.tokenize("ab", add_bos=False) == [97, 98]
    assert make_engine(FakeExecutor("yes")).prepare(TextRequest("ab")).tokens == [97, 98]


class LongerVocabulary(ByteTokenizer):
    """Has a token more than the model."""

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        before, found, behind = text.partition("<image>")
        ids = super().encode(before, add_bos=add_bos)
        return [*ids, FakeExecutor().vocab_size, *super().encode(behind, add_bos=False)] if found else ids

    def piece(self, token: int) -> bytes:
        return b"<image>" if token == FakeExecutor().vocab_size else super().piece(token)


def test_a_token_that_the_model_has_no_embedding_for_is_refused_and_the_next_request_works():
    engine = TextEngine(FakeExecutor("yes"), LongerVocabulary(), context_length=64, parallel=1, prefill_chunk=16)
    with pytest.raises(BadRequest, match="the prompt has the token '<image>', for which the model has no embedding"):
        engine.prepare(TextRequest("what is this? <image>!"))
    assert run(engine, TextRequest(scripted(0)))[0].text == "yes"


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
        answer(FakeExecutor(), TextRequest("tell me", SamplingParams(seed=seed, temperature=2.0), num_predict=30)).text
        for seed in (7, 7, 8, 0, 2**64 - 1)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_without_a_seed_every_answer_is_another():
    request = TextRequest("tell me", SamplingParams(temperature=2.0), num_predict=30)
    assert answer(FakeExecutor(), request).text != answer(FakeExecutor(), request).text


def test_rows_of_all_kinds_say_in_one_batch_what_they_say_alone(depth: int):
    alone = [answer(FakeExecutor(), request).text for request in mixed_requests()]
    engine = make_engine(FakeExecutor(depth=depth), parallel=len(MIXED))
    company = [got.text for got in run(engine, *mixed_requests())]
    assert company == alone


def test_rows_that_join_and_leave_in_mid_flight_change_nothing_for_the_others(depth: int):
    requests = mixed_requests()
    alone = [answer(FakeExecutor(), request) for request in requests]
    engine = make_engine(FakeExecutor(depth=depth), parallel=3, prefill_chunk=5)
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
        engine.proceed()
    got = [Answer(outputs[n]) for n in outputs]
    assert [each.text for each in got] == [each.text for each in alone]
    assert [each.done.eval_tokens for each in got] == [each.done.eval_tokens for each in alone]


def test_where_forward_computes_nothing_is_begun_before_the_tokens_are_told():
    executor = FakeExecutor("some text", "some more text")
    engine = make_engine(executor, parallel=2)
    for number in range(2):
        engine.add(number, engine.prepare(TextRequest(scripted(number), GREEDY)))
    while not engine.idle:
        begun = executor.steps
        told = engine.step()
        engine.proceed()
        assert executor.steps == begun + 1
        assert told
    assert executor.most_under_way == 1


def test_where_forward_only_begins_the_next_step_is_begun_on_tokens_that_nobody_has_read():
    planned: list[tuple[int, ...]] = []
    executor = FakeExecutor("text", depth=1, before_step=lambda _, step: planned.append(step.rows[0].tokens))
    (got,) = run(make_engine(executor, prefill_chunk=2), TextRequest(scripted(0, "abc")))
    assert got.text == "text"
    # The end is seen when the step behind it is under way already.
    assert planned == [tuple(b"ab"), (ord("c"), 16), (), (), (), (), ()]
    assert executor.most_under_way == 2


def test_a_row_that_joins_takes_the_lowest_free_slot_and_no_slot_is_taken_twice(depth: int):
    slots: list[set[int]] = []
    executor = FakeExecutor(*"abc", depth=depth, before_step=lambda _, step: slots.append({r.slot for r in step.rows}))
    engine = make_engine(executor, parallel=3)
    requests = [TextRequest(scripted(n % 3), num_predict=1) for n in range(7)]
    assert [got.text for got in run(engine, *requests)] == list("abcabca")
    assert set().union(*slots) == {0, 1, 2}
    run(engine, TextRequest("x", num_predict=2))
    assert slots[-1] == {0}


# --- counts and ends


def test_the_stop_token_is_told_but_not_counted():
    done = answer(FakeExecutor("four"), TextRequest(scripted(0, "abc"))).done
    assert done.reason is FinishReason.STOP
    assert (done.prompt_tokens, done.cached_tokens, done.eval_tokens, done.stop_token) == (4, 0, 4, True)


def test_durations_begin_with_the_admission_and_add_up(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    done = answer(FakeExecutor("four"), TextRequest(scripted(0))).done
    assert done.prompt_ns > 0
    assert done.eval_ns > 0
    assert done.prompt_ns + done.eval_ns <= next(clock)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_num_predict_is_the_most_that_is_said_and_no_step_is_wasted_beyond_it(count: int, depth: int):
    executor = FakeExecutor("a long answer", depth=depth)
    got = answer(executor, TextRequest(scripted(0), num_predict=count))
    assert (got.text, got.done.reason) == ("a long answer"[:count], FinishReason.LENGTH)
    assert executor.steps == count


def test_without_num_predict_the_context_is_filled(depth: int):
    got = answer(FakeExecutor("x" * 300, depth=depth), TextRequest(scripted(0, "abc")), context_length=50)
    assert (got.done.eval_tokens, got.done.reason) == (46, FinishReason.LENGTH)


def test_num_ctx_limits_prompt_and_answer_together_and_is_capped_by_the_engine():
    small = answer(FakeExecutor("x" * 300), TextRequest(scripted(0, "abc"), num_ctx=20), context_length=50)
    assert small.done.prompt_tokens + small.done.eval_tokens == 20
    large = answer(FakeExecutor("x" * 300), TextRequest(scripted(0, "abc"), num_ctx=9999), context_length=50)
    assert large.done.prompt_tokens + large.done.eval_tokens == 50


def test_a_prompt_as_long_as_the_context_is_too_long():
    engine = make_engine(FakeExecutor(), context_length=10, adds_bos=True)
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
    engine = TextEngine(FakeExecutor(), tokenizer, context_length=10, parallel=1, prefill_chunk=16)
    with pytest.raises(BadRequest, match=r"input length \(at least 1000000 tokens\) exceeds"):
        engine.prepare(TextRequest("x" * 1_000_000))
    assert tokenizer.encoded == 0


def test_of_a_hopelessly_long_prompt_only_the_ends_are_encoded_for_truncation():
    tokenizer = CountingTokenizer()
    engine = TextEngine(FakeExecutor(), tokenizer, context_length=10, parallel=1, prefill_chunk=16)
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
    engine = make_engine(FakeExecutor(), context_length=10)
    prepared = engine.prepare(TextRequest("abcdefghijklmnopqrst", num_keep=keep, truncate=True))
    assert bytes(prepared.tokens).decode() == kept
    assert run(engine, TextRequest("abcdefghijklmnopqrst", num_keep=keep, truncate=True))[0].done.prompt_tokens == 9


# --- context shift


@pytest.mark.parametrize("keep", [0, 4, 20])
def test_a_shifted_context_goes_on_as_if_the_rest_had_been_the_prompt(keep: int, depth: int):
    prompt = "keep this in mind: "
    request = TextRequest(prompt, GREEDY, num_predict=100, num_keep=keep, num_ctx=40, shift=True)
    got = answer(FakeExecutor(depth=depth), request)
    assert got.text == said(by_heart(prompt, 100, limit=40, keep=keep, shift=True))
    assert (got.done.eval_tokens, got.done.prompt_tokens) == (100, len(prompt))


def test_a_context_that_keeps_all_of_a_full_prompt_still_has_room_to_shift():
    prompt = "abcdefgh"
    request = TextRequest(prompt, GREEDY, num_predict=12, num_keep=-1, num_ctx=9, shift=True)
    assert answer(FakeExecutor(), request).text == said(by_heart(prompt, 12, limit=9, keep=7, shift=True))


def test_shifting_rows_do_not_disturb_each_other(depth: int):
    requests = [TextRequest("row " * n, GREEDY, num_predict=60, num_ctx=16 + 5 * n, shift=True) for n in range(1, 5)]
    alone = [answer(FakeExecutor(), request).text for request in requests]
    assert [got.text for got in run(make_engine(FakeExecutor(depth=depth)), *requests)] == alone


def test_penalties_look_back_beyond_a_shift(depth: int):
    """A token that was dropped from the context still counts as said."""
    params = SamplingParams(temperature=0, presence_penalty=1000.0, repeat_last_n=30)
    request = TextRequest("abcdefgh", params, num_predict=60, num_ctx=16, shift=True)
    got = answer(FakeExecutor(depth=depth), replace(request, logprobs=True))
    tokens = [logprob.token for logprob in got.logprobs if logprob.token != "\ufffd"]
    assert len(tokens) > 20
    for place in range(len(tokens)):
        assert Counter(tokens[max(0, place - 14) : place + 1]).most_common(1)[0][1] == 1


def test_an_answer_that_shifts_for_ever_ends_after_ten_contexts():
    got = answer(FakeExecutor("x" * 5000), TextRequest(scripted(0), num_ctx=20, num_keep=1, shift=True))
    assert got.done.eval_tokens <= 200


# --- bad requests


@pytest.mark.parametrize(
    "request_",
    [
        TextRequest(""),
        TextRequest("half a pair \ud800"),
        TextRequest("x", stop=tuple(map(str, range(20_000)))),
        TextRequest("x", num_ctx=1),
        TextRequest("xx", num_ctx=1, truncate=True),
    ],
)
def test_what_cannot_be_served_is_refused(request_: TextRequest):
    with pytest.raises(BadRequest):
        make_engine(FakeExecutor()).prepare(request_)


def test_nul_bytes_are_text_like_any_other():
    assert answer(FakeExecutor("a\0b"), TextRequest(scripted(0, "\0\0"))).text == "a\0b"
