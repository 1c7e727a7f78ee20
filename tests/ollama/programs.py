"""The programs that `make ollama` builds, and why a test that needs one is skipped."""

import shutil
from pathlib import Path

import pytest

BIN = Path(__file__).parent / "bin"
VERSIONS = {"classic": "v0.24.0", "images": "v0.32.5", "newest": "v0.34.4"}


def skip_without(program):
    """Skip the test if the program is not there."""
    if not (BIN / program).exists():
        pytest.skip("`make ollama` has not been run" if shutil.which("go") else "there is no Go to build Ollama with")
