"""Why and when the process ends: signals, the parent's death, and the deadline after either.

Invariant: once a stop is asked for, the process is gone in under DEADLINE_S with exit code 0, whatever its threads do.

No PR_SET_PDEATHSIG: Linux sends it when the *thread* that started us ends, and a Go parent starts us from any thread.
"""

import asyncio
import logging
import os
import select
import signal
import stat
import sys
import threading
from types import FrameType
from typing import NoReturn

GRACE_S = 3.0
"""What running requests get to end by themselves after SIGINT or SIGTERM."""
DEADLINE_S = 3.7
PARENT_POLL_S = 0.5
SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
    os._exit(0)


def leave_at_once_on_signals() -> None:
    """While nothing is held, a signal ends the process there and then, without Python's traceback."""
    for number in SIGNALS:
        signal.signal(number, _leave)


class StopRequest:
    """The wish to stop, once uttered. Thread: the event loop's."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self.grace_s = 0.0

    @property
    def asked(self) -> bool:
        """Somebody asked for it."""
        return self._asked.is_set()

    async def wait(self) -> None:
        """Wait until somebody asks."""
        await self._asked.wait()

    def ask(self, reason: str, grace_s: float) -> None:
        """Ask for it; asking a second time ends the process at once."""
        if self.asked:
            os._exit(0)
        logger.info("stopping", extra={"fields": {"reason": reason}})
        self.grace_s = grace_s
        deadline = threading.Timer(DEADLINE_S, os._exit, (0,))
        deadline.daemon = True
        deadline.start()
        self._asked.set()

    def leave(self) -> NoReturn:
        """End the process as it is."""
        os._exit(0)

    def listen_to_signals(self) -> None:
        """Make SIGINT and SIGTERM ask."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.ask, number.name, GRACE_S)

    def release_signals(self) -> None:
        """Let signals end the process at once again: nothing is held any more."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
        leave_at_once_on_signals()

    async def watch_parent(self, parent: int) -> None:
        """Ask when `parent`, our parent's pid at the start, is our parent no more, or has closed our stdin.

        Nobody reads what running requests would still say, so they get no grace. A parent that died before `parent`
        was read shows in stderr, a pipe that it held.
        """
        if _stderr_has_lost_its_reader() and not self.asked:
            self.ask("the parent process was gone from the start", 0)
            return
        stdin_is_watched = _stdin_is_an_open_pipe()
        if stdin_is_watched:
            asyncio.get_running_loop().add_reader(0, self._read_stdin)
        try:
            while os.getppid() == parent:  # noqa: ASYNC110 - the system announces this to nobody
                await asyncio.sleep(PARENT_POLL_S)
        finally:
            if stdin_is_watched:
                asyncio.get_running_loop().remove_reader(0)
        if not self.asked:
            self.ask("the parent process is gone", 0)

    def _read_stdin(self) -> None:
        if os.read(0, 4096):
            return
        asyncio.get_running_loop().remove_reader(0)
        if not self.asked:
            self.ask("the parent process closed stdin", 0)


def _stdin_is_an_open_pipe() -> bool:
    """Whether stdin is a pipe or socket that somebody holds open; one at its end from the start says nothing."""
    if sys.stdin is None:
        # Started with fd 0 closed; whatever has that number now is our own.
        return False
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) and not _other_end_is_closed(0)


def _stderr_has_lost_its_reader() -> bool:
    """Whether stderr is a pipe that nobody reads."""
    try:
        return stat.S_ISFIFO(os.fstat(2).st_mode) and _other_end_is_closed(2)
    except OSError:
        return False


def _other_end_is_closed(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLIN if pipe == 0 else select.POLLOUT)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
