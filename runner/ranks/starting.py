"""The other ranks' processes: started by ssh, or as plain ones on this machine, and ended with this one.

What a rank needs to know goes through its stdin, so that it stands in no list of processes, and stdin stays open for as
long as this process lives: also when it is killed, the system closes it, and ssh tells the other side.

Source: mlx v0.32 mlx/_distributed_utils/launch.py for the means.
"""

import contextlib
import json
import logging
import os
import shlex
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping

from runner.ranks.hostfile import Host

_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR")
END_S = 1.0
_LINES = 20

logger = logging.getLogger(__name__)


class RankProcess:
    """One rank's process, as this machine sees it. Thread: any."""

    def __init__(self, host: Host, rank: int, invitation: Mapping[str, object], environment: Mapping[str, str]) -> None:
        """Start it; one elsewhere finds its `environment` in the invitation.

        Raises:
            OSError: there is no ssh, or no such interpreter.
        """
        self.host, self.rank = host, rank
        self._process = subprocess.Popen(  # noqa: S603 - what the hostfile says, by whoever started this
            _command(host),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            # A Ctrl-C is for the first rank, which ends the others.
            process_group=0,
        )
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._quiet = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(invitation).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Of the process on this machine."""
        return self._process.pid

    def ended(self, *, within_s: float = 0) -> int | None:
        """Its exit code, waiting so long for its end; None: it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self._process.returncode

    def last_words(self) -> str:
        """What it said last; it has ended."""
        self._reader.join(END_S)
        return self._lines[-1] if self._lines else "it said nothing"

    def close(self) -> None:
        """Have it end: its stdin is its life."""
        self._quiet = True
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def wait(self, until: float) -> None:
        """Wait for its end, and bring it about at that time of `time.monotonic`."""
        try:
            self._process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        """Pass on what it says, to the log: the last line is this process's own."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            if not self._quiet:
                logger.info("rank", extra={"fields": {"rank": self.rank, "host": self.host.name, "line": text}})


def _command(host: Host) -> list[str]:
    own = [host.python, "-m", "runner", "rank"]
    if host.is_here:
        return own
    folder = shlex.quote(os.getcwd())  # noqa: PTH109 - for a shell elsewhere
    return [*_SSH, host.name, f"cd {folder} 2>/dev/null; exec {shlex.join(own)}"]
