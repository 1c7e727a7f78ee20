"""The arithmetic of the single measurements, and what they print."""

import json

import numpy as np
import pytest

from tests.bench import busy, depth, quality
from tests.bench.bandwidth import bytes_a_second
from tests.bench.figures import LLAMA, OURS, Goal, ratios, show
from tests.bench.rows import UNTIMED_STEPS, prefill_tok_s, random_ids, step_ms


class CountedRows:
    """Rows that note what is asked of them."""

    def __init__(self) -> None:
        self.places: list[list[tuple[int, int]]] = []
        self.rewound: list[tuple[int, int]] = []

    def prefill(self, row, begin, ids):
        self.places.append([(row, begin + len(ids))])
        return 7

    def step(self, places):
        self.places.append([(row, position) for row, position, _ in places])
        return [7] * len(places)

    def rewind(self, row, begin):
        self.rewound.append((row, begin))


def test_a_step_moves_every_row_by_one_and_leaves_them_as_they_were():
    rows = CountedRows()
    assert step_ms(rows, 2, 10, 3) >= 0
    assert rows.places == [[(0, 10 + step), (1, 10 + step)] for step in range(UNTIMED_STEPS + 3)]
    assert rows.rewound == [(0, 10), (1, 10)]


def test_a_prompts_rate_is_taken_in_an_empty_row():
    rows = CountedRows()
    assert prefill_tok_s(rows, 100) > 0
    assert rows.rewound == [(0, 0), (0, 0)]
    assert rows.places == [[(0, 100)]]


def test_longer_texts_begin_as_shorter_ones():
    assert random_ids(3, 100)[:40] == random_ids(3, 40)
    assert random_ids(3, 40) != random_ids(4, 40)


def test_ratios_are_of_the_rounds_that_both_have():
    assert ratios({1: 4.0, 2: 6.0}, {2: 3.0, 3: 1.0}) == [2.0]


@pytest.mark.parametrize(
    ("values", "limit", "at", "word"),
    [
        ([1.0, 2.0, 9.0], 2.0, ">=", "met"),
        ([1.0, 2.0, 9.0], 1.9, "<=", "**not met**"),
        ([1.0], None, ">=", "for comparison"),
        ([], 1.0, ">=", "not measured"),
    ],
)
def test_a_goal_is_judged_by_the_median(values, limit, at, word):
    assert Goal("it", values, limit, at).word == word


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]):
    show("A thing", ["", "ms"], [["ours", "1.0"]], [Goal("it", [2.0], 1.0)], threads=2)
    said = capsys.readouterr().out.splitlines()
    assert "| it | 2.00 (2.00 to 2.00) | >= 1 | met |" in said
    assert json.loads(said[-1])["goals"][0]["verdict"] == "met"
    assert json.loads(said[-1])["threads"] == 2


def test_rates_count_all_rows():
    assert depth.rates_of({"128": {"1": 10.0, "4": 20.0}}) == {(128, 1): 100.0, (128, 4): 200.0}


def test_depths_are_compared_at_the_same_place():
    ours, theirs = depth.Depths(), depth.Depths()
    ours.add(1, {(128, 1): 90.0, (128, 2): 1.0}, 500.0)
    theirs.add(1, {(128, 1): 30.0}, 250.0)
    found = {goal.title: goal.values for goal in depth.goals({OURS: ours, LLAMA: theirs})}
    assert list(found.values()) == [[3.0], [2.0]]


def test_busy_steps_are_compared_with_the_quiet_ones_and_in_the_same_state():
    ours = {(others, rows): {1: 10.0 * (1 + others)} for others in busy.OTHERS for rows in busy.ROWS}
    theirs = {place: {1: 60.0} for place in ours}
    words = {goal.title: (goal.values, goal.word) for goal in busy.goals({OURS: ours, LLAMA: theirs})}
    assert words["step over the quiet one, rows: 1, other busy processes: 1"] == ([2.0], "met")
    assert words["step over the quiet one, rows: 8, other busy processes: 2"] == ([3.0], "met")
    assert words["llama.cpp's step over ours, rows: 8, other busy processes: 2"] == ([2.0], "met")


def test_equal_logits_do_not_diverge_whatever_is_added_to_them():
    logits = np.array([[1.0, 2.0, 3.0]], np.float32)
    assert quality.divergences(logits, logits + 5) == pytest.approx(0, abs=1e-12)


def test_a_divergence_is_in_nats():
    exact, rounded = np.log(np.array([[0.5, 0.5]], np.float32)), np.log(np.array([[0.25, 0.75]], np.float32))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert quality.divergences(exact, rounded) == pytest.approx(expected, rel=1e-6)


def test_files_of_logits_are_compared_place_by_place(tmp_path):
    exact, rounded = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3, 4), np.float32)
    exact[..., 1], rounded[..., 1], rounded[1, 2, 3] = 1, 1, 9
    np.save(tmp_path / "exact.npy", exact)
    np.save(tmp_path / "rounded.npy", rounded)
    mean, share = quality.compare(tmp_path / "exact.npy", tmp_path / "rounded.npy")
    assert mean > 0
    assert share == pytest.approx(5 / 6)


def test_reading_memory_has_a_speed():
    assert bytes_a_second(1, 1 << 16) > 0
