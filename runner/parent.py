"""An Ollama-style parent: starts a runner as a child process, waits for it as Ollama does, talks to it and stops it.

Owns the child: whatever happens inside `async with spawn(...)`, afterwards it is gone and reaped. Knows the wire from
the parent's side only, by its bare JSON, so that a mistake in our own wire types cannot hide itself here.
"""

import asyncio
import base64
import io
import json
import logging
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import aiohttp

from runner.config import DialectName
from runner.errors import RunnerError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

STOP_GRACE_S = 5.0
PROBE_S = 0.1
"""How often Ollama asks whether the child is ready."""
KEPT_LINES = 200
LINE_BYTES = 16 << 20
COMMIT = 2
ERROR_STATUS = 5

logger = logging.getLogger(__name__)


class ChildError(RunnerError):
    """The child died, or answered with an error; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One line of a completion, whatever the dialect. The counts are those of the last line; durations in ns."""

    content: str
    done: bool
    length: bool = False
    """The end was reached by num_predict or the context, not by the model."""
    prompt_tokens: int = 0
    prompt_ns: int = 0
    eval_tokens: int = 0
    eval_ns: int = 0


def free_port() -> int:
    """A port that was free a moment ago, found as Ollama finds it: bind and close."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Child:
    """A running child. Made by `spawn`."""

    def __init__(self, process: Process, session: aiohttp.ClientSession, dialect: DialectName, port: int) -> None:
        self.process = process
        self.dialect = dialect
        self.port = port
        self.session = session
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        """The last lines of its stdout and stderr."""
        self._heard = asyncio.Condition()
        self._drains = [asyncio.create_task(self._drain(pipe)) for pipe in (process.stdout, process.stderr)]

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def last_words(self) -> str:
        """The last line it wrote."""
        return self.lines[-1] if self.lines else "it wrote nothing"

    async def _drain(self, pipe: asyncio.StreamReader | None) -> None:
        assert pipe is not None  # spawn made both
        while line := await pipe.readline():
            self.lines.append(line.decode(errors="replace").rstrip())
            logger.debug("child", extra={"fields": {"line": self.lines[-1]}})
            async with self._heard:
                self._heard.notify_all()
        async with self._heard:
            self._heard.notify_all()

    async def said(self, text: str, timeout_s: float = 60) -> str:
        """Wait for a line that contains `text`; the line.

        Raises:
            ChildError: it ended, or time did, without saying so.
        """
        try:
            async with asyncio.timeout(timeout_s), self._heard:
                while True:
                    if line := next((line for line in self.lines if text in line), None):
                        return line
                    if all(drain.done() for drain in self._drains):
                        break
                    await self._heard.wait()
        except TimeoutError:
            pass
        raise ChildError(f'the runner did not say "{text}"; its last line: {self.last_words()}')

    async def wait(self) -> int:
        """Wait for its end and for all it wrote; the exit code, negative for a signal."""
        code = await self.process.wait()
        await asyncio.gather(*self._drains)
        return code

    async def _death(self) -> ChildError:
        code = await self.wait()
        return ChildError(f"the runner ended with exit code {code}: {self.last_words()}")

    async def health(self) -> Mapping[str, JSON] | None:
        """What the child answers to its dialect's probe; None while nobody answers 200."""
        path = "/v1/status" if self.dialect is DialectName.MLX else "/health"
        try:
            async with self.session.get(self.url + path) as response:
                return dict(await response.json(content_type=None)) if response.status == 200 else None
        except aiohttp.ClientError:
            return None

    def _is_ready(self, health: Mapping[str, JSON] | None) -> bool:
        return health is not None and (self.dialect is not DialectName.CLASSIC or health.get("status") == 0)

    async def wait_answering(self, timeout_s: float = 60) -> Mapping[str, JSON]:
        """Probe until the child answers 200, which in the classic dialect comes before the model.

        Raises:
            ChildError: it died first, or took too long.
        """
        return await self._probe(lambda health: health is not None, timeout_s, None)

    async def wait_ready(
        self, timeout_s: float = 300, progress: Callable[[float], None] | None = None
    ) -> Mapping[str, JSON]:
        """Probe until the model is loaded; `progress` is called with 0 to 1 where the dialect tells it.

        Raises:
            ChildError: it died first, reported an error, or took too long.
        """
        return await self._probe(self._is_ready, timeout_s, progress)

    async def _probe(
        self,
        enough: Callable[[Mapping[str, JSON] | None], bool],
        timeout_s: float,
        progress: Callable[[float], None] | None,
    ) -> Mapping[str, JSON]:
        end = asyncio.create_task(self.process.wait())
        try:
            async with asyncio.timeout(timeout_s):
                while not end.done():
                    health = await self.health()
                    if health is not None and enough(health):
                        return health
                    if health is not None and self.dialect is DialectName.CLASSIC:
                        await self._report(health, progress)
                    await asyncio.wait([end], timeout=PROBE_S)
        except TimeoutError as error:
            raise ChildError(f"the runner was not ready after {timeout_s:g} s: {self.last_words()}") from error
        finally:
            end.cancel()
        raise await self._death()

    async def _report(self, health: Mapping[str, JSON], progress: Callable[[float], None] | None) -> None:
        if health.get("status") == ERROR_STATUS:
            await self.stop()
            raise ChildError(f"the model could not be loaded: {self._last_error()}")
        value = health.get("progress")
        if progress is not None and isinstance(value, int | float):
            progress(float(value))

    def _last_error(self) -> str:
        """The error that the last log line of level ERROR tells."""
        for line in reversed(self.lines):
            if "level=ERROR" in line and (found := re.search(r' error=(?:"((?:\\.|[^"\\])*)"|(\S+))', line)):
                return re.sub(r"\\(.)", r"\1", found[1] or found[2])
        return self.last_words()

    async def load(self, *, context: int | None = None, parallel: int = 1, operation: int = COMMIT) -> JSON:
        """The classic dialect's POST /load; the answer with its memory table.

        Raises:
            ChildError: the child refused.
        """
        body: JSON = {
            "Operation": operation,
            "Parallel": parallel,
            "BatchSize": 512,
            "KvSize": (context or 0) * parallel,
            "LoraPath": [],
        }
        async with self.session.post(self.url + "/load", json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise ChildError(text.strip())
        answer: JSON = json.loads(text)
        return answer

    async def complete(
        self, prompt: str, options: Mapping[str, JSON] | None = None, images: Sequence[bytes] = ()
    ) -> AsyncGenerator[Piece, None]:
        """Stream a completion; closing the iterator closes the connection, which cancels it.

        Args:
            prompt: refers to the pictures by `[img-0]` and so on.
            options: Ollama's.
            images: pictures, as files.

        Raises:
            ChildError: the child refused, reported an error in the stream, or ended it without a last line.
        """
        async with aclosing(self.exchange(*self._request(prompt, options, images))) as lines:
            async for line in lines:
                yield _piece(line)

    async def embed(self, text: str) -> tuple[list[float], int]:
        """The vector of a text, and how many tokens it has.

        Raises:
            ChildError: the child refused.
        """
        async with self.session.post(self.url + "/embedding", json={"content": text}) as response:
            answer = await response.text()
            if response.status != 200:
                raise ChildError(answer.strip())
        made = json.loads(answer)
        return made["embedding"], made["prompt_eval_count"]

    async def exchange(self, path: str, body: JSON) -> AsyncGenerator[Mapping[str, JSON], None]:
        """Post a request and stream its answer's lines, the last of which says that it is.

        Raises:
            ChildError: as `complete`.
        """
        data = io.BytesIO(json.dumps(body).encode())
        headers = {"Content-Type": "application/json"}
        url = self.url + path
        try:
            async with self.session.post(url, data=data, headers=headers, read_bufsize=LINE_BYTES) as response:
                if response.status != 200:
                    raise ChildError((await response.text()).strip())
                async for text in response.content:
                    line = json.loads(text)
                    _check(line)
                    yield line
                    if _field(line, "done", "Done"):
                        return
        except aiohttp.ClientError as error:
            raise ChildError(f"the stream broke: {error}") from error
        raise ChildError("the stream ended without a last line")

    def _request(self, prompt: str, options: Mapping[str, JSON] | None, images: Sequence[bytes]) -> tuple[str, JSON]:
        given: JSON = None if options is None else dict(options)
        files = [base64.b64encode(image).decode() for image in images]
        numbered: list[JSON] = [{"data": data, "id": number} for number, data in enumerate(files)]
        match self.dialect:
            case DialectName.MLX:
                media: list[JSON] = [{"data": data, "id": number, "Kind": "image"} for number, data in enumerate(files)]
                return "/v1/completions", {"Prompt": prompt, "Options": given, **({"Media": media} if media else {})}
            case DialectName.CLASSIC:
                return "/completion", {"Prompt": prompt, "Options": given, **({"Images": numbered} if numbered else {})}
            case DialectName.IMAGEGEN:
                return "/completion", {"prompt": prompt, "options": given, **({"images": list(files)} if files else {})}

    def peak_memory_bytes(self) -> int | None:
        """The most memory it held until now; None where the system does not tell (it does on Linux)."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    async def stop(self) -> int:
        """End it as Ollama does: SIGINT, and SIGKILL after 5 s. The exit code, negative for a signal. Idempotent."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)
            try:
                async with asyncio.timeout(STOP_GRACE_S):
                    return await self.wait()
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self.process.kill()
        return await self.wait()


def _field(line: Mapping[str, JSON], *names: str) -> JSON:
    return next((line[name] for name in names if name in line), None)


def _count(line: Mapping[str, JSON], *names: str) -> int:
    value = _field(line, *names)
    return value if isinstance(value, int) else 0


def _check(line: Mapping[str, JSON]) -> None:
    """Raise ChildError if the line is an error."""
    content, error = str(_field(line, "content", "Content") or ""), _field(line, "Error", "error")
    if isinstance(error, Mapping):
        error = error.get("error") or error.get("Status") or "error"
    if error or (_field(line, "done", "Done") and content.startswith("error: ")):
        raise ChildError(str(error or content.removeprefix("error: ")))


def _piece(line: Mapping[str, JSON]) -> Piece:
    """One line of text of any dialect."""
    return Piece(
        content=str(_field(line, "content", "Content") or ""),
        done=bool(_field(line, "done", "Done")),
        length=_count(line, "done_reason", "DoneReason") == 1 or line.get("stop_reason") == "length",
        prompt_tokens=_count(line, "prompt_eval_count", "PromptEvalCount"),
        prompt_ns=_count(line, "prompt_eval_duration", "PromptEvalDuration"),
        eval_tokens=_count(line, "eval_count", "EvalCount"),
        eval_ns=_count(line, "eval_duration", "EvalDuration"),
    )


@asynccontextmanager
async def spawn(
    model: str | Path | None,
    *,
    dialect: DialectName = DialectName.CLASSIC,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    port: int | None = None,
) -> AsyncIterator[Child]:
    """Start a runner as Ollama does, in a process group of its own; at the end it is stopped and reaped.

    Args:
        model: what --model names.
        dialect: which protocol the child shall speak.
        flags: further flags.
        env: the child's whole environment; None inherits ours.
        port: the child's port; None picks a free one.
    """
    port = free_port() if port is None else port
    command = [sys.executable, "-m", "runner", "runner", f"--{dialect.value}-engine"]
    command += [] if model is None else ["--model", str(model)]
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--port", str(port)),
        *flags,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        limit=LINE_BYTES,
        env=env,
        process_group=0,
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        child = Child(process, session, dialect, port)
        try:
            yield child
        finally:
            await asyncio.shield(child.stop())
