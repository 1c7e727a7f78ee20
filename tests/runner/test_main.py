"""Exit codes and last lines, whatever a command ends by."""

import logging
import sys

import pytest

from models.errors import ModelNotFoundError
from runner import __main__ as entry
from runner.errors import LoadError
from runner.flags import UsageError


@pytest.fixture
def ends(monkeypatch, capsys):
    """Runs `main` with a command that raises or returns; the exit code and what it wrote to stderr."""

    def run(outcome):
        def dispatch(_parent: int) -> int:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(entry, "_dispatch", dispatch)
        with pytest.raises(SystemExit) as caught:
            entry.main()
        return caught.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("outcome", "code", "err"),
    [
        (0, 0, ""),
        (3, 3, ""),
        (UsageError("write it otherwise"), 2, "Error: write it otherwise\n"),
        (LoadError("no; do this"), 1, "Error: no; do this\n"),
        (ModelNotFoundError("nothing\nthere"), 1, "Error: nothing; there\n"),
        (
            PermissionError(13, "Permission denied", "/m/config.json"),
            1,
            "Error: /m/config.json: Permission denied; check that the file is there and may be read\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_each_end_has_its_code_and_its_last_line(ends, outcome, code, err):
    assert ends(outcome) == (code, err)


def test_a_bug_has_a_log_line_with_its_traceback_and_then_a_last_line(ends, caplog):
    caplog.set_level(logging.ERROR)
    code, err = ends(TypeError("not\nthis"))
    assert code == 1
    assert err.splitlines()[-1] == "Error: TypeError: not; this is a bug, please report it with the lines above"
    assert caplog.records[0].exc_info is not None


def test_running_out_of_memory_is_said_in_the_words_parents_look_for(ends):
    assert "Error: insufficient memory: MemoryError" in ends(MemoryError("no more"))[1]


@pytest.mark.parametrize(("argv", "start"), [(["--help"], "usage: "), (["--version"], "ollama-mlx-runner ")])
def test_help_and_version_go_to_stdout(monkeypatch, capsys, argv, start):
    monkeypatch.setattr(sys, "argv", ["ollama-mlx-runner", *argv])
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(start)
