"""The arithmetic of `make bench-serve`: rates, gaps, slopes, ratios within a round, and who is missing."""

import json

import pytest

from tests.bench.load import Plan as LoadPlan
from tests.bench.load import ServerRun, Streams, decode_rate, lengths, percentile
from tests.bench.report import MIB
from tests.bench.servers import SERVERS, Server, Stream, _take
from tests.bench.serving_report import GOALS, Round, bare, decode, over, slope, spread_of, to_json, to_markdown


def stream(*times: float, tokens: int | None = None) -> Stream:
    return Stream(0.0, list(times), "x" * len(times), 8, tokens or len(times))


def served(decode_tok_s: float | None, count: int = 8, text: str = "so") -> ServerRun:
    return ServerRun({count: Streams([1.0] * count, 10.0, decode_tok_s, [0.1] * count, [8] * count, [64], text)})


def test_decoding_is_measured_from_the_last_first_token_to_the_first_last_token():
    # Between 3 and 8 the first says 5 tokens and the second 10; what the first said alone, before 3, does not count.
    one = stream(*range(9))
    two = stream(*(3 + half / 2 for half in range(20)))
    assert decode_rate([one, two]) == pytest.approx(15 / 5)


def test_a_single_streams_rate_is_its_steps_after_the_first_token():
    assert decode_rate([stream(2, 3, 4, 5, 6)]) == 1


def test_a_line_of_several_tokens_counts_for_all_of_them():
    assert decode_rate([stream(1, 2, 3, 4, 5, tokens=10)]) == 2


def test_streams_that_hardly_overlap_have_no_rate():
    assert decode_rate([stream(0, 1, 2, 3, 4, 5), stream(4, 5, 6, 7, 8, 9)]) is None


def test_percentiles_are_values_that_were_seen():
    assert [percentile([4, 1, 3, 2], share) for share in (0.01, 0.5, 0.75, 0.99)] == [1, 2, 3, 4]


def test_the_slope_is_that_of_the_line_through_the_samples():
    rise, error = slope([(number, (100 + 2 * number) * MIB) for number in range(0, 50, 10)]) or (0, 1)
    assert (rise, error) == (pytest.approx(2), pytest.approx(0, abs=1e-9))
    assert slope([(0, MIB), (1, MIB)]) is None


def test_noise_that_does_not_rise_has_a_slope_within_its_error():
    rise, error = slope([(number, (100 + number % 2) * MIB) for number in range(40)]) or (9, 0)
    assert abs(rise) < error


def test_a_ratio_compares_within_each_round_and_skips_those_without_both():
    rounds = [
        Round({"runner": served(30)}, {8: 10}),
        Round({"runner": served(10)}, {8: 10}),
        Round({"runner": served(None)}, {8: 10}),
        Round({}, {8: 10}),
    ]
    spread = spread_of(rounds, over(decode("runner", 8), bare(8)))
    assert spread is not None
    assert (spread.least, spread.most) == (1, 3)


def test_a_goal_may_be_a_ceiling():
    health = next(goal for goal in GOALS if "health" in goal.title)
    fast, slow = ServerRun(health_s=[0.001] * 99), ServerRun(health_s=[0.001] * 90 + [0.03] * 10)
    for run, word in ((fast, "met"), (slow, "**not met**")):
        assert health.word(spread_of([Round({"runner": run})], health.measure)) == word
    assert health.word(None) == "not measured"


def test_every_goal_is_measured_where_everything_is_there():
    def run() -> ServerRun:
        made = ServerRun({count: served(9.0, count).streams[count] for count in (1, 2, 4, 8, 16)})
        made.first_turn_s, made.second_turn_s, made.gaps_s, made.health_s = 2.0, 0.1, [0.1, 0.2], [0.001]
        return made

    memory = [(number, 500 * MIB) for number in range(5)]
    whole = Round({each.name: run() for each in SERVERS}, {1: 9.0, 16: 9.0}, memory)
    report = json.loads(json.dumps(to_json([whole], {})))
    assert [goal["title"] for goal in report["goals"] if goal["verdict"] == "not measured"] == []
    assert "| first turn over second turn, time to first token | 20.0 (20.0 to 20.0) | >= 10 | met |" in to_markdown(
        [whole], {}
    )


def test_who_failed_is_listed_with_the_reason():
    text = to_markdown([Round({"runner": served(9.0)}, failures={"llama": "no compiler"})], {"CPU": "some"})
    assert "- round 1: **llama-server, Q4_1 as it is**: no compiler" in text
    assert "| llama-server, Q4_1 as it is |  |" in text


def test_another_text_is_told():
    def turn(text: str) -> Round:
        return Round({"runner-f32": served(9.0, 1, "so it is"), "mlx-lm-blas": served(9.0, 1, text)})

    assert "mlx_lm.server + MKL, f32: the same text" in to_markdown([turn("so it")], {})
    assert "mlx_lm.server + MKL, f32: ANOTHER TEXT" in to_markdown([turn("no")], {})


def test_lines_of_either_wire_are_understood():
    ours, theirs = Stream(0.0), Stream(0.0)
    _take(ours, 1.0, b'{"Content":"a","Done":false}')
    _take(ours, 2.0, b'{"Content":"","Done":true,"PromptEvalCount":5,"EvalCount":1}')
    _take(theirs, 1.0, b": keepalive 1/2")
    _take(theirs, 1.0, b'{"choices":[{"text":"a","finish_reason":null}]}')
    _take(theirs, 2.0, b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":1}}')
    _take(theirs, 2.0, b"[DONE]")
    assert ours == theirs == Stream(0.0, [1.0], "a", 5, 1)
    with pytest.raises(LookupError, match="too long"):
        _take(ours, 3.0, b'{"error":{"message":"too long"}}')


def test_everyone_is_asked_for_a_greedy_stream():
    ours, theirs = (Server(kind, "", 0, None).body("p", 3) for kind in ("runner", "llama.cpp"))
    assert ours == {"Prompt": "p", "Options": {"num_predict": 3}}
    assert theirs["temperature"] == 0
    assert theirs["stream"] is True


def test_a_plan_names_the_prompts_it_needs():
    assert lengths(LoadPlan()) == {64, 512, 1024, 2000}
    assert lengths(LoadPlan(chat_tokens=None, long_tokens=None)) == {64, 512}
