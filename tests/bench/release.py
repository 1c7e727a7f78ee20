"""The release that this project is compared with: its sources from the project's own history, its own environment."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.commands import REPOSITORY, PreparationError, once, python_in, run

COMMIT = "e1eeeb2110bf1cc015a537e3bcdea35d6f5dcf5a"
VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class Release:
    """Where it is."""

    folder: Path
    python: Path
    missing: str | None = None
    """Why it is not there."""


def prepare_release(place: Path, say: Callable[[str], None]) -> Release:
    """Make what is missing: a clone that borrows the project's objects, and an environment with what it needs."""
    folder, venv = place / f"release-{VERSION}", place / f"release-{VERSION}-venv"
    python, stamp = python_in(venv), venv / ".installed"
    try:
        once(folder, say, f"taking release {VERSION} from the project's history", _clone)
        if not stamp.exists():
            say(f"installing what release {VERSION} needs (once)")
            run([sys.executable, "-m", "venv", str(venv)])
            run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", str(folder)])
            stamp.touch()
    except PreparationError as error:
        say(f"no release {VERSION}: {error}")
        return Release(folder, python, str(error))
    return Release(folder, python)


def _clone(target: Path) -> None:
    run(["git", "clone", "--quiet", "--shared", "--no-checkout", str(REPOSITORY), str(target)])
    run(["git", "-C", str(target), "checkout", "--quiet", "--detach", COMMIT])
