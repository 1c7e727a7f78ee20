"""An end to calls that let no other thread run."""

import signal
import subprocess
import sys

_HOLDS = """
import ctypes
from runner.ranks.guard import killed_after
with killed_after({seconds}, "what is to be done"):
    # Unlike CDLL it keeps the interpreter for itself.
    ctypes.PyDLL(None).usleep({microseconds})
print("went on")
"""


def guarded(seconds, microseconds):
    text = _HOLDS.format(seconds=seconds, microseconds=microseconds)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60)


def test_a_call_that_takes_too_long_ends_the_process_with_a_last_line():
    done = guarded(0.2, 50_000_000)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == "Error: what is to be done\n"


def test_one_that_comes_back_in_time_is_let_be():
    done = guarded(60, 1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
