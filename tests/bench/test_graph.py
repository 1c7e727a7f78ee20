"""The measurement of graph building says what it measured, in a form that a program can read."""

import json
import sys

import pytest

from tests.bench import graph


def test_the_last_line_is_the_times_by_number_of_rows(monkeypatch, capsys):
    monkeypatch.setattr(graph, "ROWS", (1, 3))
    monkeypatch.setattr(graph, "REPEATS", 2)
    monkeypatch.setattr(graph, "CONFIG", graph.CONFIG | {"num_hidden_layers": 2})
    monkeypatch.setattr(sys, "argv", ["graph"])
    graph.main()
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["mlx_lm"] == {}
    assert set(measured["ours"]) == {"1", "3"}
    assert all(milliseconds > 0 for milliseconds in measured["ours"].values())


def test_an_interpreter_without_mlx_lm_measures_nothing(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no module named mlx_lm' >&2\nexit 1\n")
    python.chmod(0o755)
    assert graph.elsewhere(python) == {}
    assert "no module named mlx_lm" in capsys.readouterr().err


def test_only_the_best_time_of_building_counts_and_computing_does_not():
    built: list[int] = []
    best = graph.best_ms(lambda: built.append(0), lambda _: None)
    assert len(built) == graph.REPEATS
    assert best == pytest.approx(0, abs=5)
