"""The image benchmark's arithmetic: steps, ratios round by round, goals, agreement, and who failed."""

import ast
import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.bench.commands import REPOSITORY
from tests.bench.image_client import PictureStream, take
from tests.bench.image_contestants import IMAGE_CONTESTANTS, chosen_images
from tests.bench.image_measurement import ImageMeasurement, flow_sigmas, small, timed_steps
from tests.bench.image_report import (
    IMAGE_GOALS,
    Agreement,
    ImageGoal,
    ImageOutcome,
    agreements,
    judge,
    to_json,
    to_markdown,
)
from tests.bench.image_sections import further_lines, profile_lines, soak_lines
from tests.bench.image_soak import SoakResult
from tests.bench.profile_image import KINDS, Spent, by_kind
from tests.bench.report import MIB, Spread


def measured(*step_s: float, decode_s: float | None = 8.0, peak: int | None = 900 * MIB) -> ImageMeasurement:
    return ImageMeasurement(1.0, list(step_s), {"thing": "1"}, decode_s, None, peak)


def outcomes(**step_s: list[float | None]) -> dict[str, ImageOutcome]:
    """Contestants by name (`_` for `-`), each with the time of a step in every round; None: it failed there."""
    made = {}
    for key, seconds in step_s.items():
        name = key.replace("_", "-")
        outcome = ImageOutcome(next(each for each in IMAGE_CONTESTANTS if each.name == name))
        for turn, value in enumerate(seconds, 1):
            if value is None:
                outcome.failures.append(f"round {turn}: no luck")
            else:
                outcome.runs[turn] = measured(value)
        made[name] = outcome
    return made


def test_a_step_is_timed_to_its_end_and_the_first_is_left_out(monkeypatch: pytest.MonkeyPatch):
    moments = itertools.accumulate([100.0, 9.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr("tests.bench.image_measurement.time.perf_counter", lambda: next(moments))
    assert timed_steps(iter([None] * 4)) == [1.0, 2.0, 3.0]


def test_steps_and_decode_are_counted_from_the_streams_lines():
    stream = PictureStream(begin=10.0)
    lines = [{"queue": 1}, {"step": 0, "total": 3}, {"step": 1}, {"step": 2}, {"step": 3}, {"step": 3}, {"done": True}]
    for moment, line in zip([10.1, 11, 14, 15, 17, 20, 25], lines, strict=True):
        take(stream, moment, line)
    assert stream.step_s == [1.0, 2.0]
    assert stream.decode_s == 8.0
    assert stream.total_s == 15.0


def test_a_figure_of_a_round_is_the_median_of_its_steps():
    outcome = outcomes(runner=[])["runner"]
    outcome.runs[1] = measured(1.0, 9.0, 2.0)
    assert outcome.values("step") == {1: 2.0}
    assert outcome.values("encode") == {}
    assert outcome.values("peak") == {1: 900.0}


def test_a_ratio_compares_within_each_round():
    # The second round was three times as slow for both: the ratio of medians would be 1.5, no round's ratio is.
    seen = judge(ImageGoal("step", "diffusers", "runner"), outcomes(runner=[10, 30, 30], diffusers=[20, 60, 30])).ratio
    assert seen == Spread(2.0, 1.0, 2.0)


def test_a_ratio_uses_only_rounds_in_which_both_ran():
    verdict = judge(ImageGoal("step", "mflux", "runner"), outcomes(runner=[2, 1, 1], mflux=[40]))
    assert verdict.ratio == Spread(20.0, 20.0, 20.0)


@pytest.mark.parametrize(
    ("most", "aim", "word"),
    [
        (1.4, 1.1, "**not met**"),
        (1.5, 1.1, "met, not the aim"),
        (1.6, 1.5, "met, the aim too"),
        (1.5, None, "met"),
        (None, None, "for comparison"),
    ],
)
def test_a_goal_is_met_up_to_its_number(most: float | None, aim: float | None, word: str):
    goal = ImageGoal("step", "runner", "diffusers", most=most, aim=aim)
    assert judge(goal, outcomes(runner=[15], diffusers=[10])).word == word


@pytest.mark.parametrize(("least", "word"), [(20.0, "met"), (20.1, "**not met**")])
def test_a_goal_is_met_from_its_number_on(least: float, word: str):
    assert judge(ImageGoal("step", "mflux", "runner", least=least), outcomes(runner=[2], mflux=[40])).word == word


def test_a_goal_against_somebody_absent_is_not_measured():
    goal = ImageGoal("step", "runner", "diffusers", most=1.0)
    assert judge(goal, outcomes(runner=[10])).word == "not measured"
    assert judge(goal, outcomes(runner=[10], diffusers=[None])).word == "not measured"


def test_a_figure_that_a_contestant_does_not_have_is_not_compared():
    made = outcomes(runner=[10], mflux=[40])
    made["mflux"].runs[1] = measured(40.0, decode_s=None, peak=None)
    assert judge(ImageGoal("decode", "mflux", "runner"), made).word == "not measured"
    assert "| mflux as installed | 40.0 |  |  |  | 1.00 |" in to_markdown(made, {})


def test_outputs_are_compared_with_those_of_diffusers():
    made = outcomes(runner=[10], diffusers=[10])
    made["diffusers"].outputs = {"velocity": np.zeros((2, 2), np.float32), "picture": np.zeros((1, 2), np.float32)}
    made["runner"].outputs = {"picture": np.array([[0.0, 1 / 255]], np.float32)}
    (found,) = agreements(made)
    assert found == Agreement("runner", "picture", pytest.approx(1.0), pytest.approx(0.5))
    assert "| runner over HTTP | the picture, in 1/255 | 1 | 0.5 |" in to_markdown(made, {})


def test_without_diffusers_there_is_nothing_to_compare():
    assert "- nothing to compare" in to_markdown(outcomes(runner=[10], mflux=[10]), {})


def test_a_failed_contestant_is_reported_with_its_reason():
    text = to_markdown(outcomes(runner=[10, 10], diffusers=[None, None]), {"CPU": "some"})
    assert "| diffusers on torch | missing | missing |" in text
    assert "- **diffusers on torch** failed: round 2: no luck" in text
    assert "| a step | runner over HTTP | diffusers on torch |  | <= 1.4 (aim 1.1) | not measured |" in text


def test_the_json_holds_every_run_and_every_goal():
    report = json.loads(json.dumps(to_json(outcomes(runner=[10, 20], diffusers=[10, 20]), {"CPU": "some"})))
    runs = report["contestants"][0]["runs"]
    assert [(run["round"], run["step"], run["peak"]) for run in runs] == [(1, 10, 900), (2, 20, 900)]
    assert len(report["goals"]) == len(IMAGE_GOALS)
    assert report["goals"][2]["ratio"]["median"] == 1.0


def test_every_goal_names_contestants():
    known = {contestant.name for contestant in IMAGE_CONTESTANTS}
    assert {name for goal in IMAGE_GOALS for name in (goal.over, goal.under)} <= known


def test_an_unknown_contestant_is_refused():
    with pytest.raises(ValueError, match="no contestant comfyui; there are runner"):
        chosen_images(["comfyui"])


def test_noise_levels_are_shifted_and_end_at_nothing():
    assert flow_sigmas(2) == [1.0, 0.75, 0.0]
    assert small(np.zeros((1, 16, 32, 32), np.float32)).shape == (1, 16, 8, 8)


def test_a_soak_tells_growth_and_health():
    grown = [(number, 100 * MIB + 10240 * number) for number in range(10)]
    result = SoakResult("demo", 12, grown, [0.5] * 10, [0.001] * 98 + [0.25, 0.3])
    text = "\n".join(soak_lines(result))
    assert "RSS grew by 10.0 ± 0.0 KiB a picture (goal <= 5: **not met**)" in text
    assert "100 probes: p50 1.0 ms, p99 250.0 ms" in text
    assert "failed: gone" in "\n".join(soak_lines(SoakResult(failure="gone")))


def test_compiled_code_is_charged_to_the_function_of_the_project_that_called_it():
    ours = str(REPOSITORY / "models" / "x.py")
    attend, finish, multiply = (ours, "attend.work"), (ours, "finish"), (ours, "Gemm.multiply")
    kinds, unnamed = by_kind(
        {
            attend: Spent(0.5),
            finish: Spent(0.25),
            multiply: Spent(1.0, {attend: 0.25, finish: 0.75}),
            ("", "sgemm"): Spent(3.0, {multiply: 3.0}),
        }
    )
    assert kinds == {"attention": pytest.approx(0.5 + 1.0), "matrix products": pytest.approx(3.0)}
    assert unnamed == {"finish": pytest.approx(0.25)}


def test_every_function_that_the_profile_names_exists():
    folder = REPOSITORY / "models"
    files = [*folder.glob("image/*.py"), *folder.glob("image/z_image/*.py")]
    there = {name for file in files for name in qualified_names(ast.parse(file.read_text()), "")}
    assert {part for key in KINDS for part in key.split(" < ")} <= there


def qualified_names(node: ast.AST, within: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield within + child.name
            yield from qualified_names(child, f"{within}{child.name}.")
        else:
            yield from qualified_names(child, within)


def test_sections_are_told_as_tables():
    profile = {"step": {"whole_s": 1.0, "kinds_s": {"SwiGLU": 1.0}, "unnamed_s": 3.0, "most_unnamed_s": {"f": 3.0}}}
    assert "| SwiGLU | 25.0% |" in profile_lines(profile)
    assert "| the rest (f) | 75.0% |" in profile_lines(profile)
    row = {"threshold": 0.1, "computed": 5.0, "time_share": 0.625, "mean_apart": 1.25}
    cache = {"pipeline": "demo", "steps": 8, "side": 64, "pictures": 4, "rows": [row]}
    tiles = {"tile": 64, "tiled_s": 2.0, "whole_s": 1.0, "mean_apart": 0.1, "most_apart": 3.0}
    lines = further_lines({"step_cache": cache, "tiles": tiles})
    assert "| 0.1 | 5.0 | 0.62 | 1.25 |" in lines
    assert "| 2.00 | 1.00 | 0.10 | 3.00 |" in lines
