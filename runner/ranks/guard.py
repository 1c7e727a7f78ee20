"""An end to a call that nothing in this process can end: MLX joins its ranks without letting other threads run.

A process beside this one waits for word. If none comes in time, it writes the last line and kills this one.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_WATCH = """
import os, select, signal, sys
ready, _, _ = select.select([0], [], [], float(sys.argv[2]))
if not ready:
    sys.stderr.write("Error: " + sys.argv[3] + "\\n")
    sys.stderr.flush()
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@contextlib.contextmanager
def killed_after(seconds: float, message: str) -> Iterator[None]:
    """Whatever happens within takes no longer than that, or the process ends with this line. Thread: any."""
    guard = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(seconds), message], stdin=subprocess.PIPE
    )
    try:
        yield
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()
