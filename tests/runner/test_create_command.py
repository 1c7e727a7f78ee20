"""The `create` command as a person runs it: real processes, interrupted, starved and set against each other."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tty
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from models.checkpoint import open_checkpoint
from models.sources.ollama import OllamaManifest

pytestmark = pytest.mark.process

# A terminal takes some twelve kilobytes that nobody reads, 250 bars; so a command with more to show stands still in
# its middle until somebody does.
TENSORS = 330


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of many small tensors, all different."""
    folder = tmp_path_factory.mktemp("many")
    mx.save_safetensors(str(folder / "model.safetensors"), {f"model.t{n}": mx.full(64, n) for n in range(TENSORS)})
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def arguments(source: Path, store: Path, *more: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "runner",
        "create",
        "m",
        "--from",
        str(source),
        "--store",
        str(store),
        *map(str, more),
    ]


def unmeasured() -> dict[str, str]:
    """The environment without the measurement of coverage.

    It would write its files where only a few fit, and it takes its own lock at every call: a signal's exception between
    taking and releasing it would leave the command waiting for itself.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


class OnTerminal:
    """A command whose stderr is a terminal that is read only on demand."""

    def __init__(self, command: list[str], terminal: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._terminal = terminal
        self.shown = b""

    def read_until(self, text: bytes) -> None:
        while text not in self.shown:
            assert self._read(), self.shown

    def finish(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        return self.process.wait(60)

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._terminal], [], [], 60)
        assert ready, self.shown
        try:
            data = os.read(self._terminal, 512)
        except OSError:  # Linux's way to say that the other end is closed
            return b""
        self.shown += data
        return data


@contextlib.contextmanager
def on_terminal(command: list[str]) -> Iterator[OnTerminal]:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": theirs}
    process = subprocess.Popen(command, **streams, env=unmeasured())
    os.close(theirs)
    try:
        yield OnTerminal(command, ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def check_whole(store: Path, *, tensors: int = TENSORS) -> None:
    """Everything a manifest names is there and whole, and nothing else is."""
    checkpoint = open_checkpoint("m", store, verify_digests=True)
    assert isinstance(checkpoint, OllamaManifest)
    assert len(list(checkpoint.infos())) == tensors
    manifests = [path for path in (store / "manifests").rglob("*") if path.is_file()]
    named = set()
    for path in manifests:
        manifest = json.loads(path.read_text())
        named |= {each["digest"].replace(":", "-") for each in [manifest["config"], *manifest["layers"]]}
    assert {path.name for path in (store / "blobs").iterdir()} == named


def test_a_model_is_created_and_said_to_be(tiny_llama, store):
    done = run(*arguments(tiny_llama, store, "--quantize=int8"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("m:latest: 27 layers, 0.1 MB, in ")
    assert done.stderr.splitlines()[0] == "chat format: the model's own"
    assert "creating m [##############################] 100% in" in done.stderr
    assert open_checkpoint("m", store).config["model_type"] == "llama"


def test_a_template_may_be_a_file(tiny_llama, store, tmp_path):
    (tmp_path / "t.txt").write_text("Q: {{ .Prompt }} A:")
    assert run(*arguments(tiny_llama, store, "--template", tmp_path / "t.txt")).returncode == 0
    assert b"Q: {{ .Prompt }} A:" in files_of(store).values()


@pytest.mark.parametrize(
    ("template", "words"), [("no-such-file", "is no file that can be read"), (__file__ + "x", "is no file")]
)
def test_a_template_that_is_none_is_wrong_usage(tiny_llama, store, template, words):
    done = run(*arguments(tiny_llama, store, "--template", template))
    assert done.returncode == 2
    assert words in done.stderr
    assert not store.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create"], "create needs one name and where from"),
        (["create", "m"], "create needs one name and where from"),
        (["create", "--from", "x"], "create needs one name and where from"),
        (["create", "m", "n", "--from", "x"], "create needs one name and where from"),
        (["create", "m", "--from", "x", "--quantize", "q4_0"], "--quantize must be one of int4, int8, nvfp4"),
    ],
)
def test_wrong_usage_says_what_to_write(words, message):
    done = run(sys.executable, "-m", "runner", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {message}")


def test_what_is_wrong_with_a_source_is_the_last_line(store, tmp_path):
    done = run(*arguments(tmp_path / "nothing", store))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"Error: {tmp_path}/nothing: no such file or folder"


def test_a_killed_create_is_resumed_and_what_it_made_is_used(many, store):
    with on_terminal(arguments(many, store)) as command:
        command.read_until(b"  1%")
        command.process.kill()
        assert command.finish() == -signal.SIGKILL
    made = {path: path.stat().st_ino for path in (store / "blobs").iterdir()}
    assert made
    assert not (store / "manifests").exists()
    left = store / "blobs" / "sha256-create-0123456789abcdef"
    left.write_bytes(b"half a blob")
    assert run(*arguments(many, store)).returncode == 0
    check_whole(store)
    whole = [path for path in made if not path.name.startswith("sha256-create-")]
    assert whole
    assert all(path.stat().st_ino == made[path] for path in whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_create_leaves_nothing(many, store, number):
    with on_terminal(arguments(many, store)) as command:
        command.read_until(b"  1%")
        assert (store / "blobs").exists()
        command.process.send_signal(number)
        assert command.finish() == 130
        assert command.shown.endswith(b"%\ninterrupted; nothing of it stays\n")
    assert not store.exists()


def test_impatient_signals_do_not_disturb_the_tidying_up(many, store):
    with on_terminal(arguments(many, store)) as command:
        command.read_until(b"  1%")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            command.process.send_signal(number)
        assert command.finish() == 130
        assert command.shown.endswith(b"%\ninterrupted; nothing of it stays\n")
    assert not store.exists()


def test_an_interrupted_create_leaves_a_store_as_it_was(many, tiny_llama, store):
    run(*arguments(tiny_llama, store))
    before = files_of(store)
    with on_terminal(arguments(many, store)) as command:
        command.read_until(b"  1%")
        command.process.send_signal(signal.SIGTERM)
        assert command.finish() == 130
    assert files_of(store) == before


def test_two_creates_of_one_name_go_one_after_the_other(many, store):
    with on_terminal(arguments(many, store)) as first, contextlib.ExitStack() as stack:
        first.read_until(b"  1%")
        second = stack.enter_context(on_terminal(arguments(many, store)))
        second.read_until(b"waiting for another create in ")
        assert first.finish() == 0
        assert second.finish() == 0
    check_whole(store)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_waited_for_a_create_that_ended_early_makes_the_whole_model(many, store, number):
    with on_terminal(arguments(many, store)) as first, contextlib.ExitStack() as stack:
        first.read_until(b"  1%")
        second = stack.enter_context(on_terminal(arguments(many, store)))
        second.read_until(b"waiting for another create in ")
        first.process.send_signal(number)
        assert first.finish() != 0
        assert second.finish() == 0
    check_whole(store)


def test_a_full_disk_leaves_nothing_and_says_so(many, store, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    # The last of the tensors is the one that does not fit.
    tensors = {f"model.t{n}": mx.full(64, n) for n in range(9)} | {"model.z": mx.zeros(1 << 16)}
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    (source / "config.json").write_text((many / "config.json").read_text())
    limited = ["bash", "-c", 'ulimit -f 64 && exec "$@"', "bash", *arguments(source, store)]
    done = run(*limited, env=unmeasured())
    assert done.returncode == 1
    assert "the store cannot be written: File too large; make room" in done.stderr.splitlines()[-1]
    assert not store.exists()


def test_a_store_that_cannot_be_written_is_named(tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*arguments(tiny_llama, tmp_path / "file"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: {tmp_path}/file")


def test_the_store_is_that_of_the_environment(tiny_llama, tmp_path):
    command = [sys.executable, "-m", "runner", "create", "m", "--from", str(tiny_llama)]
    assert run(*command, env=os.environ | {"OLLAMA_MODELS": str(tmp_path / "mine")}).returncode == 0
    assert open_checkpoint("m", tmp_path / "mine").config["model_type"] == "llama"
