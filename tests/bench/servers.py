"""The servers that `make bench-serve` compares: how each is started, and how it is spoken to.

Everyone is asked by `ask`, the same code over the same client; wires differ in the body and in what a line says.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import aiohttp

from runner.config import DialectName
from runner.parent import ChildError, free_port, spawn
from tests.bench.commands import REPOSITORY
from tests.bench.contestants import fast_blas
from tests.bench.run_runner import FLOAT32_FLAGS
from tests.bench.serving_preparation import ServingPrepared

READY_TIMEOUT_S = 120
STREAM_TIMEOUT_S = 600
STOP_TIMEOUT_S = 10
CONTEXT_TOKENS = 2560
"""What one row may hold: the long conversation and its answers."""
ROWS = 16
Kind = Literal["runner", "release", "mlx_lm", "llama.cpp"]
"""The release is our runner as it was, started from its own environment."""
RUNNERS = ("runner", "release")


@dataclass(frozen=True, slots=True)
class ServerContestant:
    """One server of the comparison."""

    name: str
    label: str
    kind: Kind
    float32: bool = True
    """Whether its weights are held as float32, else as the file's own 4-bit blocks."""
    preloads_blas: bool = False
    is_slow: bool = False
    """It gets short prompts, few tokens and few streams, or it would take an hour."""


RUNNER, EXACT_RUNNER, RELEASE = "runner", "runner-f32", "release-0.1.0"
BLAS, LLAMA, LLAMA_F32 = "mlx-lm-blas", "llama", "llama-f32"
SERVERS = (
    ServerContestant(RUNNER, "runner, Q4_1 as it is", "runner", float32=False),
    ServerContestant(EXACT_RUNNER, "runner, f32", "runner"),
    ServerContestant(RELEASE, "runner 0.1.0, f32", "release"),
    ServerContestant(BLAS, "mlx_lm.server + MKL, f32", "mlx_lm", preloads_blas=True),
    ServerContestant("mlx-lm", "mlx_lm.server as installed, f32", "mlx_lm", is_slow=True),
    ServerContestant(LLAMA_F32, "llama-server, F32", "llama.cpp"),
    ServerContestant(LLAMA, "llama-server, Q4_1 as it is", "llama.cpp", float32=False),
)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up."""

    kind: Kind
    url: str
    pid: int
    session: aiohttp.ClientSession

    @property
    def health_url(self) -> str:
        return self.url + ("/v1/status" if self.kind in RUNNERS else "/health")

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        """A greedy completion."""
        if self.kind in RUNNERS:
            # In an Options object the keys that are absent are zero: greedy, no penalties.
            return {"Prompt": prompt, "Options": {"num_predict": tokens}}
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        return asked | {"stream_options": {"include_usage": True}}


@dataclass(slots=True)
class Stream:
    """One request and its answer. Times are of `perf_counter`, when a line was in the client's hands."""

    begin: float
    times: list[float] = field(default_factory=list)
    """One for each line with text."""
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.begin


async def ask(server: Server, prompt: str, tokens: int, until: asyncio.Event | None = None) -> Stream:
    """Stream one completion on a connection of its own; with `until`, leave once that is set.

    Raises:
        LookupError: the server refused, broke the stream or said nothing.
    """
    stream, lines = Stream(time.perf_counter()), []
    try:
        async with server.session.post(server.url + "/v1/completions", json=server.body(prompt, tokens)) as response:
            if response.status != 200:
                raise LookupError(f"status {response.status}: {(await response.text()).strip()[:200]}")
            async for line in response.content:
                lines.append((time.perf_counter(), line))
                if until is not None and until.is_set():
                    break
    except (aiohttp.ClientError, TimeoutError) as error:
        raise LookupError(f"the stream broke: {error!r}") from error
    # Only now: the clock is not to pay for reading JSON.
    for moment, line in lines:
        _take(stream, moment, line.removeprefix(b"data:").strip())
    if not stream.times:
        raise LookupError("a stream without text")
    stream.tokens = stream.tokens or len(stream.times)
    return stream


def _take(stream: Stream, moment: float, line: bytes) -> None:
    if not line.startswith(b"{"):
        return
    said: Mapping[str, Any] = json.loads(line)
    if error := said.get("error") or said.get("Error"):
        raise LookupError(f"an error in the stream: {error}")
    choices: Sequence[Mapping[str, Any]] = said.get("choices") or [{}]
    if text := choices[0].get("text") or said.get("Content"):
        stream.times.append(moment)
        stream.text += text
    if usage := said.get("usage"):
        stream.prompt_tokens, stream.tokens = usage["prompt_tokens"], usage["completion_tokens"]
    elif said.get("Done"):
        stream.prompt_tokens, stream.tokens = said["PromptEvalCount"], said["EvalCount"]


@asynccontextmanager
async def start(
    contestant: ServerContestant, prepared: ServingPrepared, threads: int, flags: Sequence[str] = ()
) -> AsyncIterator[Server]:
    """A server that answers; it ends with the context.

    Args:
        contestant: which one.
        prepared: where its files are.
        threads: of its matrix products.
        flags: further ones, for our runner.

    Raises:
        LookupError: it cannot run here, or does not come up; the message says why.
    """
    count = str(threads)
    env = os.environ | {"MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count}
    timeout = aiohttp.ClientTimeout(total=STREAM_TIMEOUT_S, sock_connect=10)
    # A connection is used once: nothing of one stream waits for another.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
        if contestant.kind == "runner":
            words = [*_runner_flags(threads), *(FLOAT32_FLAGS if contestant.float32 else ()), *flags]
            async with spawn(prepared.base.gguf, dialect=DialectName.MLX, flags=words, env=env) as child:
                try:
                    await child.wait_ready()
                except ChildError as error:
                    raise LookupError(str(error)) from None
                yield Server("runner", child.url, child.pid, session)
            return
        port = free_port()
        folder = prepared.base.release.folder if contestant.kind == "release" else REPOSITORY
        async with _process(_command(contestant, prepared, threads, port), folder, env) as (process, log):
            server = Server(contestant.kind, f"http://127.0.0.1:{port}", process.pid, session)
            await _ready(server, process, log)
            yield server


def _runner_flags(threads: int) -> list[str]:
    return [f"--threads={threads}", f"--parallel={ROWS}", f"--context={CONTEXT_TOKENS}"]


def _command(contestant: ServerContestant, prepared: ServingPrepared, threads: int, port: int) -> list[str]:
    if contestant.kind == "release":
        release = prepared.base.release
        if release.missing is not None:
            raise LookupError(release.missing)
        words = [str(release.python), "-m", "runner", "--mlx-engine", "--model", str(prepared.base.gguf)]
        return [*words, "--port", str(port), "--weights=float32", *_runner_flags(threads)]
    if contestant.kind == "llama.cpp":
        if prepared.llama_server is None:
            raise LookupError(prepared.no_llama_server or "not built")
        model = prepared.base.gguf_float32 if contestant.float32 else prepared.base.gguf
        words = [str(prepared.llama_server), "--model", str(model), "--port", str(port), "--no-webui"]
        words += ["--threads", str(threads), "--threads-batch", str(threads)]
        words += ["--parallel", str(ROWS), "--ctx-size", str(ROWS * CONTEXT_TOKENS)]
        # Its AMX kernels crash on Q4_1 (ggml-org/llama.cpp#20824); what this switches off has nothing else for Q4_1.
        return [*words, "--no-repack"]
    words = [str(prepared.base.bench_python), "-m", "tests.bench.run_mlx_lm_server"]
    if contestant.preloads_blas:
        blas = fast_blas()
        if blas is None:
            raise LookupError("there is no BLAS of a package here to load before MLX")
        words.append(f"--blas={blas}")
    words += ["--", "--model", str(prepared.base.folder), "--port", str(port), "--prompt-concurrency", str(ROWS)]
    # By default it keeps ten prompts, fewer than there are streams.
    return [*words, "--decode-concurrency", str(ROWS), "--prompt-cache-size", str(4 * ROWS), "--log-level", "WARNING"]


@asynccontextmanager
async def _process(
    command: Sequence[str], folder: Path, env: Mapping[str, str]
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    with TemporaryDirectory() as place:
        log = Path(place) / "log"
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=folder, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file
            )
        try:
            yield process, log
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def _ready(server: Server, process: asyncio.subprocess.Process, log: Path) -> None:
    end = time.monotonic() + READY_TIMEOUT_S
    while process.returncode is None and time.monotonic() < end:
        try:
            async with server.session.get(server.health_url) as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.1)
    raise LookupError(f"it did not come up; its last line: {_last_line(log)}")


def _last_line(log: Path) -> str:
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1] if said else "none"
