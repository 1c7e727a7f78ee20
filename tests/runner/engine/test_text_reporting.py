import logging
import math

import pytest

from models.sampling import Drawn
from runner.engine import reporting
from runner.engine.types import TextDone, TextRequest, TokenLogprob
from tests.fakes import ByteTokenizer, FakeExecutor, scripted
from tests.runner.engine.serving import GREEDY, answer, make_engine, run

# --- log-probabilities


def test_logprobs_are_aligned_with_the_text():
    request = TextRequest(scripted(0), GREEDY, logprobs=True, top_logprobs=3)
    got = answer(FakeExecutor("Grüße"), request)
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
    got = answer(FakeExecutor("ab</s>cd"), TextRequest(scripted(0), GREEDY, stop=("</s>",), logprobs=True))
    assert [logprob.token for logprob in got.logprobs] == ["a", "b"]
    assert got.logprobs[0].top == ()


def test_logprobs_wait_with_the_text_that_is_held_back():
    got = answer(FakeExecutor("a</b"), TextRequest(scripted(0), GREEDY, stop=("</s>",), logprobs=True))
    assert [(chunk.text, len(chunk.logprobs)) for chunk in got.chunks] == [("a", 1), ("</b", 3)]


def test_the_token_of_an_unfinished_character_is_told_at_the_end():
    got = answer(FakeExecutor(b"a\xc3"), TextRequest(scripted(0), GREEDY, logprobs=True))
    assert got.text == "a"
    assert len(got.logprobs) == 2


def test_tokens_are_told_in_text():
    assert reporting.told(Drawn(65), ByteTokenizer().piece) is None
    told = reporting.told(Drawn(65, -0.1, ((65, -0.1), (0xC3, -2.0))), ByteTokenizer().piece)
    assert told == TokenLogprob("A", -0.1, (TokenLogprob("A", -0.1), TokenLogprob("\ufffd", -2.0)))


def test_only_the_row_that_asked_gets_logprobs(depth: int):
    engine = make_engine(FakeExecutor("yes", depth=depth))
    asked, other = run(engine, TextRequest(scripted(0), logprobs=True), TextRequest(scripted(0)))
    assert len(asked.logprobs) == 3
    assert other.logprobs == []


# --- log lines


def fields(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, object]]:
    return [record.fields for record in caplog.records if record.message == message]


def test_each_request_leaves_a_line_with_its_counts(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "runner.engine")
    answer(FakeExecutor("four"), TextRequest(scripted(0, "abc")))
    (line,) = fields(caplog, "completion done")
    assert (line["prompt_tokens"], line["eval_tokens"], line["reason"]) == (4, 4, "stop")


def test_long_work_is_told_of_while_it_lasts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    caplog.set_level(logging.INFO, "runner.engine")
    monkeypatch.setattr(reporting, "REPORT_NS", 0)
    answer(FakeExecutor("four"), TextRequest(scripted(0, "x" * 40)))
    assert [(line["done"], line["total"]) for line in fields(caplog, "prefill")] == [(16, 41), (32, 41)]
    assert [line["eval_tokens"] for line in fields(caplog, "decode")] == [1, 2, 3, 4]


def test_the_final_counts_are_those_of_the_text():
    done = answer(FakeExecutor("four"), TextRequest(scripted(0))).end
    assert isinstance(done, TextDone)
    assert done.eval_tokens == len("four")
