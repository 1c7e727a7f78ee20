"""A real Ollama server as a test sees it: its address, its log, its children, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ollama
import psutil

from tests.ollama.programs import BIN

RUNNER = Path(sys.executable).with_name("ollama-mlx-runner")


class Server:
    """`with Server(version, store, home) as server`. Leaving stops it as a person would, with ctrl-C."""

    def __init__(self, version, store, home, *, runner=RUNNER, **environ):
        self.version = version
        self.home = Path(home)
        self.address = "127.0.0.1:0"
        self.lines = []
        self._grown = threading.Condition()
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")},
            "OLLAMA_HOST": self.address,
            "OLLAMA_MODELS": str(store.folder),
            "OLLAMA_MLX_RUNNER": str(runner),
            "OLLAMA_NO_CLOUD": "1",
            "OLLAMA_DEBUG": "1",
            "HOME": str(home),
            **{name: str(value) for name, value in environ.items()},
        }

    def __enter__(self):
        self.process = subprocess.Popen(
            [BIN / f"ollama-{self.version}", "serve"],
            env=self.environ,
            cwd=self.environ["HOME"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = self.wait_for(r"Listening on (\S+) ")[1]
        self.client = ollama.Client(host=self.address, timeout=60)
        return self

    def __exit__(self, *_):
        self.client.close()
        children = self.children()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(15)
        finally:
            self.process.kill()
            for child in psutil.wait_procs(children, 10)[1]:
                child.kill()
            self._reader.join(10)
            self.process.stdout.close()

    def _read(self):
        for line in self.process.stdout:
            with self._grown:
                self.lines.append(line)
                self._grown.notify_all()

    @property
    def seen(self):
        """How much of the log there is: where `wait_for` may begin."""
        return len(self.lines)

    def wait_for(self, pattern, since=0, timeout=30):
        """The first match in the log from line `since` on."""

        def found():
            return next(filter(None, (re.search(pattern, line) for line in self.lines[since:])), None)

        with self._grown:
            match = self._grown.wait_for(found, timeout)
        assert match, f"no {pattern!r} within {timeout} s in the log's lines\n{''.join(self.lines[since:])}"
        return match

    def children(self):
        """The runners, by psutil."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def child(self):
        """The only runner."""
        (child,) = self.children()
        return child


def run_ollama(server, *words):
    """Ollama's command line as a person uses it, with this server if it runs."""
    return subprocess.run(
        [BIN / f"ollama-{server.version}", *words],
        env={**server.environ, "OLLAMA_HOST": server.address},
        cwd=server.environ["HOME"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
