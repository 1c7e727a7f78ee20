"""Where things lie: the store, the cache, and paths that no shell has read. Knows the environment it is given alone."""

from collections.abc import Mapping
from pathlib import Path

from runner.flags import variable
from runner.usage import PREFIX, PROGRAM


def _home(environ: Mapping[str, str]) -> Path:
    home = environ.get("HOME")
    return Path(home) if home else Path.home()


def folder_of(text: str | None, environ: Mapping[str, str]) -> Path | None:
    """The path that a setting names, if it names any."""
    return None if text is None else path_of(text, environ)


def path_of(text: str, environ: Mapping[str, str]) -> Path:
    """A path from an environment variable or from behind an equals sign, where no shell has read the `~`."""
    return _home(environ) / text.removeprefix("~/") if text.startswith("~/") else Path(text)


def store_folder(flag: str | None, environ: Mapping[str, str]) -> Path:
    """The Ollama store: what was asked for, else ~/.ollama/models."""
    return Path(flag) if flag else _home(environ) / ".ollama" / "models"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where the default model is kept: OLLAMA_MLX_RUNNER_CACHE, else a folder in the user's cache (XDG_CACHE_HOME)."""
    if own := variable(environ, PREFIX + "CACHE"):
        return Path(own)
    xdg = variable(environ, "XDG_CACHE_HOME")
    return (Path(xdg) if xdg else _home(environ) / ".cache") / PROGRAM
