"""A progress bar for the commands that a person waits for."""

import sys
import time

BAR_WIDTH = 30


class ProgressBar:
    """A bar on stderr: redrawn in place on a terminal, elsewhere one line at the end."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._begin = time.perf_counter()
        self._live = sys.stderr.isatty()
        self._drawn = False

    def show(self, fraction: float, note: str = "") -> None:
        """Draw it at 0 to 1, with a note instead of the percentage if there is one."""
        if self._live:
            filled = round(BAR_WIDTH * min(1.0, max(0.0, fraction)))
            bar = "#" * filled + "-" * (BAR_WIDTH - filled)
            sys.stderr.write(f"\r{self._label} [{bar}] {note or f'{fraction:4.0%}'}")
            sys.stderr.flush()
            self._drawn = True

    def abandon(self) -> None:
        """Leave it as it is; what follows has a line of its own."""
        if self._drawn:
            sys.stderr.write("\n")

    def finish(self) -> float:
        """Draw it full, with the time it took; returns the seconds."""
        seconds = time.perf_counter() - self._begin
        start = "\r" if self._live else ""
        sys.stderr.write(f"{start}{self._label} [{'#' * BAR_WIDTH}] 100% in {seconds:.1f} s\n")
        sys.stderr.flush()
        return seconds
