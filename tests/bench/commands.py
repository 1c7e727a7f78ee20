"""Commands that make what the bench needs, each thing once, whole or not at all."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 3600


class PreparationError(Exception):
    """A step of the preparation failed; the message says which and why."""


def once(target: Path, say: Callable[[str], None], doing: str, make: Callable[[Path], None]) -> None:
    """Make `target` beside its place and move it there: it is whole or absent."""
    if target.exists():
        return
    say(doing)
    partial = target.with_name(f"partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial)
    partial.replace(target)


def run(words: list[str], **environment: str) -> None:
    """Run a command to its end.

    Raises:
        PreparationError: it failed.
    """
    try:
        done = subprocess.run(
            words,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PreparationError(f"{' '.join(words[1:])}: {error}") from error
    if done.returncode != 0:
        raise PreparationError(f"{' '.join(words[1:])}: {_reason(done.stderr or done.stdout)}")


def python_in(venv: Path) -> Path:
    """A virtual environment's interpreter."""
    return venv / ("Scripts" if os.name == "nt" else "bin") / "python"


def _reason(said: str) -> str:
    """The last line that calls itself an error, else the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no reason given"])[-1]
