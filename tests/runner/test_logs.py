"""Log lines as Go's slog.TextHandler writes them."""

import io
import logging
import math
import re
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from runner import logs


@pytest.fixture
def stream():
    """All logging goes into this; afterwards logging is as it was."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions, threading.excepthook
    text = io.StringIO()
    logs.configure(0, text)
    yield text
    logging.captureWarnings(capture=False)
    root.handlers[:], level, logging.raiseExceptions, threading.excepthook = before
    root.setLevel(level)


def test_a_line_has_the_shape_of_ollamas(stream):
    logging.getLogger("x").info("model loaded", extra={"fields": {"seconds": 1.5, "name": "qwen3:4b"}})
    assert re.fullmatch(
        r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}(Z|[+-]\d\d:\d\d) level=INFO source=test_logs\.py:\d+ "
        r'msg="model loaded" seconds=1\.5 name=qwen3:4b\n',
        stream.getvalue(),
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "x"', r'"say \"x\""'),
        ("back\\slash", "back\\slash"),
        ("back\\ slash", '"back\\\\ slash"'),
        ("line\nbreak\ttab", r'"line\nbreak\ttab"'),
        ("bell\x07 esc\x1b", r'"bell\a esc\x1b"'),
        ("naïve 日本", '"naïve 日本"'),
        ("日本", "日本"),
        ("nbsp\u00a0x", r'"nbsp\u00a0x"'),
        ("\ud800", r'"\ud800"'),
        ("\U000e0001", r'"\U000e0001"'),
        (True, "true"),
        (None, "<nil>"),
        (3, "3"),
        (0.1234567, "0.123457"),
        (math.nan, "NaN"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (timedelta(milliseconds=1500), "1.5s"),
        ([1, "b"], '"[1 b]"'),
        (Path("/tmp/x"), "/tmp/x"),
    ],
)
def test_values_are_quoted_and_escaped_as_go_does(stream, value, text):
    logging.getLogger("x").info("m", extra={"fields": {"k": value}})
    assert stream.getvalue().endswith(f" msg=m k={text}\n")


@pytest.mark.parametrize(
    ("debug", "levels"),
    [(2, "TRACE DEBUG INFO WARN ERROR"), (1, "DEBUG INFO WARN ERROR"), (0, "INFO WARN ERROR"), (-1, "WARN ERROR")],
)
def test_the_debug_number_sets_the_level(stream, debug, levels):
    logs.configure(debug, stream)
    logger = logging.getLogger("x")
    for level in (logs.TRACE, logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "m")
    assert re.findall(r"level=(\w+)", stream.getvalue()) == levels.split()


def test_a_traceback_stays_on_its_line(stream):
    try:
        raise ValueError("first\nsecond")  # noqa: TRY301
    except ValueError:
        logging.getLogger("x").exception("failed")
    line, rest = stream.getvalue().split("\n", 1)
    assert rest == ""
    assert r"""error=ValueError('first\nsecond') stack="Traceback""" in line


def test_an_exception_that_ends_a_thread_is_logged_in_one_line(stream):
    def work() -> None:
        raise ValueError("lost")

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    thread.join()
    assert "level=ERROR" in stream.getvalue()
    assert "thread=worker" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_a_closed_stderr_does_no_harm(stream, capsys):
    stream.close()
    logging.getLogger("x").info("nobody reads this")
    logs.fatal("nor this", stream)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("port taken", "Error: port taken\n"),
        ("first\n  second\n\n", "Error: first; second\n"),
        ("half \ud800 a pair", "Error: half \\ud800 a pair\n"),
    ],
)
def test_the_fatal_line_is_one_line_whatever_it_holds(message, line):
    stream = io.StringIO()
    logs.fatal(message, stream)
    assert stream.getvalue() == line


def test_the_fatal_line_goes_to_stderr(capsys):
    logs.fatal("x")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Error: x\n")
    assert sys.stderr is not None
