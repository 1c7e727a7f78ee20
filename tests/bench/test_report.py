"""The benchmark's arithmetic: rates, ratios round by round, goals, and what becomes of a contestant that failed."""

import itertools
import json
from pathlib import Path

import pytest

from tests.bench.commands import REPOSITORY, PreparationError
from tests.bench.contestants import CONTESTANTS, DEFAULT_TOKENS, chosen, command, folder
from tests.bench.measurement import Measurement, time_stream
from tests.bench.preparation import Prepared
from tests.bench.release import Release, prepare_release
from tests.bench.report import GOALS, Goal, Outcome, Spread, judge, same_text, to_json, to_markdown


def measured(decode_s: float = 63.0, *, prompt: int = 512, tokens: int = 64, text: str = "so") -> Measurement:
    return Measurement(
        load_s=1.0,
        first_token_s=2.0,
        decode_s=decode_s,
        prompt_tokens=prompt,
        tokens=tokens,
        peak_rss_bytes=1 << 20,
        text=text,
        versions={"thing": "1"},
    )


def outcomes(**decode_s: list[float | None]) -> dict[str, Outcome]:
    """Contestants by name (`_` for `-`), each with the decode time of every round; None: it failed there."""
    made = {}
    for key, seconds in decode_s.items():
        name = key.replace("_", "-")
        outcome = Outcome(next(contestant for contestant in CONTESTANTS if contestant.name == name))
        for turn, value in enumerate(seconds, 1):
            if value is None:
                outcome.failures.append(f"round {turn}: no luck")
            else:
                outcome.add(
                    turn, measured(value, prompt=outcome.contestant.prompt_tokens, tokens=outcome.contestant.tokens)
                )
        made[name] = outcome
    return made


def test_rates_count_the_prompt_to_the_first_token_and_the_steps_after_it():
    run = measured(decode_s=6.3)
    assert run.prefill_tok_s == 256
    assert run.decode_tok_s == pytest.approx(10)


def test_a_stream_is_timed_from_its_first_piece_to_its_last(monkeypatch: pytest.MonkeyPatch):
    ticks = itertools.count()
    monkeypatch.setattr("tests.bench.measurement.time.perf_counter", lambda: float(next(ticks)))
    timed = time_stream("abcd")
    assert (timed.first_token_s, timed.decode_s, timed.pieces) == (1, 3, ["a", "b", "c", "d"])


def test_a_ratio_compares_within_each_round():
    # The second round was three times as slow for both: the ratio of medians would be 1.5, no round's ratio is.
    seen = judge(Goal("decode", "runner", "bare", 1.9), outcomes(runner=[10, 30, 30], bare=[20, 60, 30]))
    assert seen == Spread(2.0, 1.0, 2.0)


def test_a_ratio_uses_only_rounds_in_which_both_ran():
    seen = judge(Goal("decode", "runner", "bare", 0.95), outcomes(runner=[None, 10, 10], bare=[1, 20, None]))
    assert seen == Spread(2.0, 2.0, 2.0)


def test_a_figure_without_another_is_that_of_every_round():
    assert judge(Goal("load", "runner", None, 2.5, "<="), outcomes(runner=[10, None, 10])) == Spread(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("limit", "at", "aim", "word"),
    [
        (2.0, ">=", None, "met"),
        (2.01, ">=", None, "**not met**"),
        (2.0, ">=", 3.0, "met"),
        (1.0, ">=", 2.0, "met, and the aim"),
        (2.0, "<=", 1.9, "met"),
        (1.9, "<=", None, "**not met**"),
        (None, ">=", None, "for comparison"),
    ],
)
def test_a_goal_is_met_from_its_number_on(limit: float | None, at: str, aim: float | None, word: str):
    goal = Goal("decode", "runner", "bare", limit, at, aim)
    assert goal.word(judge(goal, outcomes(runner=[10], bare=[20]))) == word


def test_a_goal_against_somebody_absent_is_not_measured():
    goal = Goal("decode", "runner", "bare", 1.0)
    assert goal.word(judge(goal, outcomes(runner=[10]))) == "not measured"
    assert goal.word(judge(goal, outcomes(bare=[10]))) == "not measured"
    assert goal.word(judge(goal, outcomes(runner=[10], bare=[None]))) == "not measured"


def test_a_run_of_another_length_is_a_failure():
    outcome = outcomes(runner=[])["runner"]
    outcome.add(1, measured(tokens=63))
    assert not outcome.runs
    assert outcome.failures == ["512 and 63 tokens instead of 512 and 64"]


def test_a_failed_contestant_is_reported_with_its_reason():
    made = outcomes(runner=[10, 10], llama_cpp=[None, None])
    text = to_markdown(made, {"CPU": "some"})
    assert "| llama.cpp, Q4_1 as it is | 512 + 64 | missing | missing |" in text
    assert "- **llama.cpp, Q4_1 as it is** failed: round 2: no luck" in text
    assert (
        "| decode | runner over HTTP, Q4_1 as it is | its model, bare loop, Q4_1 |  | >= 0.9 | not measured |" in text
    )


def test_the_json_holds_every_run_and_every_goal():
    report = json.loads(json.dumps(to_json(outcomes(runner=[10, 20], bare=[10, 20]), {"CPU": "some"})))
    runs = report["contestants"][0]["runs"]
    assert [(run["round"], run["decode"]) for run in runs] == [(1, 6.3), (2, 3.15)]
    assert len(report["goals"]) == len(GOALS)
    over_bare = next(goal for goal in report["goals"] if goal["other"] == "bare")
    assert over_bare["value"]["median"] == 1.0


def test_another_text_is_told():
    made = outcomes(runner=[10], runner_f32=[10], bare=[10], bare_f32=[10])
    assert same_text(made) == ["its model, bare loop, f32: the same text"]
    made["bare-f32"].runs[2] = measured(text="not so")
    assert same_text(made) == ["its model, bare loop, f32: ANOTHER TEXT"]


def test_a_longer_run_leaves_the_slow_ones_their_own_length():
    by_name = {contestant.name: contestant.tokens for contestant in chosen(None, 200)}
    assert by_name["runner"] == 200
    assert by_name["mlx-lm"] == 16
    assert {contestant.tokens for contestant in chosen(None, 4)} == {4}
    assert chosen(["bare"], DEFAULT_TOKENS)[0].name == "bare"


def test_an_unknown_contestant_is_refused():
    with pytest.raises(ValueError, match="no contestant vllm; there are runner"):
        chosen(["vllm"], DEFAULT_TOKENS)


def test_every_goal_names_a_contestant():
    named = {goal.ours for goal in GOALS} | {goal.other for goal in GOALS if goal.other}
    assert named <= {contestant.name for contestant in CONTESTANTS}


def prepared(missing: str | None = None) -> Prepared:
    place, paths = Path("place"), [Path(f"{number}") for number in range(8)]
    return Prepared(*paths, release=Release(place / "release", place / "python", missing))


def test_the_release_runs_its_own_bench_in_its_own_place_with_the_flags_that_it_knows():
    release = next(contestant for contestant in CONTESTANTS if contestant.interpreter == "release")
    words = command(release, prepared(), 2, 0.0)
    assert words[0] == str(Path("place", "python"))
    assert folder(release, prepared()) == Path("place", "release")
    assert not any(word.startswith("--float32") for word in words)
    with pytest.raises(LookupError, match="no git"):
        command(release, prepared("no git"), 2, 0.0)


def test_only_those_that_widen_the_file_are_told_so():
    told = {
        each.name for each in CONTESTANTS if not each.preloads_blas and "--float32" in command(each, prepared(), 2, 0)
    }
    assert told == {"runner-f32", "bare-f32"}
    assert folder(CONTESTANTS[0], prepared()) == REPOSITORY


def test_a_release_that_cannot_be_had_is_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def run(words: list[str]) -> None:
        raise PreparationError("no such commit")

    monkeypatch.setattr("tests.bench.release.run", run)
    said: list[str] = []
    assert prepare_release(tmp_path, said.append).missing == "no such commit"
    assert said[-1] == "no release 0.1.0: no such commit"
