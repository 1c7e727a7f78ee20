import json
from dataclasses import replace

import pytest

from protocol.ollamarunner import LoadRequest
from protocol.options import Options
from runner.dialects.base import HINTS, LOWEST_LOGPROB, PICTURE_FIELDS, split_lines, text_request, wire_logprobs
from runner.engine.types import SamplingParams, TextRequest, TokenLogprob
from runner.errors import BadRequest


def encode(text, logprobs):
    return json.dumps([text, [entry.token for entry in logprobs]], ensure_ascii=False).encode() + b"\n"


def split(text, logprobs=(), limit=64):
    lines = list(split_lines(text, tuple(logprobs), encode, limit))
    return lines, [json.loads(line) for line in lines]


def test_every_option_is_obeyed_or_a_documented_hint():
    obeyed = {
        "num_keep", "seed", "num_predict", "top_k", "top_p", "min_p", "typical_p", "repeat_last_n", "temperature",
        "repeat_penalty", "presence_penalty", "frequency_penalty", "stop", "num_ctx", "draft_num_predict",
    }  # fmt: skip
    obeyed_or_refused = {"Operation", "LoraPath", "Parallel", "KvSize", "KvCacheType", "ProjectorPath"}
    fields = [field.alias or name for model in (Options, LoadRequest) for name, field in model.model_fields.items()]
    assert set(fields) - obeyed - obeyed_or_refused - set(PICTURE_FIELDS) == set(HINTS)


def test_absent_options_are_ollamas_defaults():
    assert text_request("p", None) == TextRequest(prompt="p")


def test_zero_options_turn_everything_off():
    off = SamplingParams(
        temperature=0,
        top_k=0,
        top_p=0,
        min_p=0,
        typical_p=0,
        repeat_last_n=0,
        repeat_penalty=0,
        presence_penalty=0,
        frequency_penalty=0,
        seed=0,
    )
    assert text_request("p", Options()) == TextRequest(prompt="p", sampling=off, num_keep=0)


def test_given_options_are_obeyed():
    options = Options(
        num_keep=2, seed=7, num_predict=5, num_ctx=99, top_k=3, top_p=0.5, min_p=0.1, typical_p=0.7, repeat_last_n=-1,
        temperature=1.5, repeat_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.25, stop=("a", "b"),
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=1.5, top_k=3, top_p=0.5, min_p=0.1, typical_p=0.7, repeat_last_n=-1, repeat_penalty=1.2,
        presence_penalty=-0.5, frequency_penalty=0.25, seed=7,
    )  # fmt: skip
    assert text_request("p", options, shift=True, truncate=True) == TextRequest(
        prompt="p", sampling=sampling, num_predict=5, num_ctx=99, num_keep=2, stop=("a", "b"), shift=True, truncate=True
    )


@pytest.mark.parametrize("num_predict", [0, -1, -2, -7])
def test_num_predict_without_a_limit(num_predict):
    assert text_request("p", Options(num_predict=num_predict)).num_predict is None


@pytest.mark.parametrize(
    ("options", "draft"), [({}, None), ({"draft_num_predict": 3}, 3), ({"draft_num_predict": 0}, 0)]
)
def test_drafting_is_refused_only_by_a_zero_that_was_written(options, draft):
    assert text_request("p", Options.from_value(options)).draft == draft
    assert text_request("p", None).draft is None


def test_a_negative_seed_is_random_and_the_requests_own_seed_goes_first():
    assert text_request("p", Options(seed=-1)).sampling.seed is None
    assert text_request("p", Options(seed=-1), seed=5).sampling.seed == 5
    assert text_request("p", Options(seed=4), seed=5).sampling.seed == 5
    assert text_request("p", None, seed=5).sampling.seed == 5


def test_values_beyond_their_range_mean_off_where_ollama_takes_them_so():
    options = Options(temperature=-1.0, top_k=-1, top_p=2.0, typical_p=3.0, repeat_last_n=-5, num_keep=-9)
    wanted = text_request("p", options)
    off = SamplingParams(temperature=0, top_k=0, top_p=1, typical_p=1, repeat_last_n=-1, repeat_penalty=0, seed=0)
    assert wanted.sampling == replace(off, min_p=0.0)
    assert wanted.num_keep == -1


@pytest.mark.parametrize(
    "options",
    [
        Options(num_ctx=-1),
        Options(repeat_penalty=-0.1),
        Options(min_p=-0.1),
        Options(min_p=1.1),
        Options(top_p=-0.1),
        Options(typical_p=-0.1),
    ],
)
def test_impossible_values_are_refused(options):
    with pytest.raises(BadRequest):
        text_request("p", options)


@pytest.mark.parametrize("count", [-1, 21])
def test_top_logprobs_out_of_range_are_refused(count):
    with pytest.raises(BadRequest, match="TopLogprobs"):
        text_request("p", None, logprobs=True, top_logprobs=count)


def test_top_logprobs_count_only_with_logprobs():
    assert text_request("p", None, logprobs=True, top_logprobs=20).top_logprobs == 20
    assert text_request("p", None, top_logprobs=20).top_logprobs == 0


def test_empty_and_repeated_stop_strings_are_dropped():
    assert text_request("p", Options(stop=("", "a", "", "b", "a"))).stop == ("a", "b")


def test_a_short_line_is_not_split():
    lines, parts = split("hello")
    assert len(lines) == 1
    assert parts == [["hello", []]]


@pytest.mark.parametrize("text", ["x" * 1000, "é" * 500, "\x01" * 300, "\U0001f600" * 99, '"\\' * 200])
def test_a_long_text_is_split_into_short_lines_without_loss(text):
    lines, parts = split(text)
    assert all(len(line) <= 64 for line in lines)
    assert "".join(part for part, _ in parts) == text


def test_a_split_keeps_log_probabilities_on_the_line_of_their_text():
    words = [f"w{number} " for number in range(100)]
    lines, parts = split("".join(words), [TokenLogprob(word, -1.0) for word in words])
    assert all(len(line) <= 64 for line in lines)
    assert [token for _, tokens in parts for token in tokens] == words
    assert all(text == "".join(tokens) for text, tokens in parts)


def test_a_split_gives_every_line_some_text_even_if_the_tokens_have_none():
    _, parts = split("abcdefgh", [TokenLogprob("", -1.0) for _ in range(8)], limit=14)
    assert "".join(part for part, _ in parts) == "abcdefgh"
    assert all(text for text, _ in parts)
    assert sum(len(tokens) for _, tokens in parts) == 8


def test_many_log_probabilities_on_little_text_are_split_too():
    lines, parts = split("a", [TokenLogprob("tok", -1.0) for _ in range(50)])
    assert all(len(line) <= 64 for line in lines)
    assert "".join(part for part, _ in parts) == "a"
    assert sum(len(tokens) for _, tokens in parts) == 50


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1e30])
def test_a_vanishing_probability_is_written_as_a_number(value):
    top = TokenLogprob("b", value)
    (written,) = wire_logprobs((TokenLogprob("a", value, (top,)),))
    assert written.logprob == LOWEST_LOGPROB
    assert written.top_logprobs[0].logprob == LOWEST_LOGPROB
