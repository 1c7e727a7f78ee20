"""Embeddings: texts a second at several batches and lengths, beside sentence-transformers and llama.cpp's server."""

import argparse
import asyncio
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np

from models.device import usable_cores
from runner.config import DialectName
from runner.folders import cache_folder
from runner.parent import free_port, spawn
from tests.bench.commands import REPOSITORY
from tests.bench.embed_preparation import LONGEST, EmbedPrepared, prepare_embed, write_texts
from tests.bench.figures import Goal, chosen, ratios, run_module, say, show
from tests.bench.serving_preparation import LLAMA_SERVER

BATCHES, LENGTHS = (1, 8, 64), (16, 128, 512)
MIXED = 64
OURS, OURS_INT8, TORCH, ONNX, LLAMA = "runner", "runner-int8", "torch", "st-onnx", "llama"
LABELS = {
    OURS: "this runner, float32, over HTTP",
    OURS_INT8: "this runner, `--weights int8`",
    TORCH: "sentence-transformers on torch, in process",
    ONNX: "sentence-transformers on ONNX Runtime, in process",
    LLAMA: "llama-server, F32, over HTTP",
}
READY_S, ASKED_AGAIN_S = 60.0, 0.1


@dataclass(frozen=True, slots=True)
class Run:
    """One contestant: seconds of each request by shape, the first text's vector, and the most memory."""

    times: Mapping[str, list[float]]
    vector: list[float]
    peak_bytes: int

    def rate(self, batch: int, length: int) -> float:
        """Texts a second."""
        return batch / median(self.times[f"{batch}x{length}"])


def shapes() -> dict[str, list[int]]:
    """The lengths of each request's texts; those of mixed lengths also sorted, in eighths."""
    made = {f"{batch}x{length}": [length] * batch for length in LENGTHS for batch in BATCHES}
    rng = random.Random(11)
    mixed = [min(LONGEST, max(4, round(rng.lognormvariate(3.7, 0.9)))) for _ in range(MIXED)]
    ordered = sorted(mixed)
    each = MIXED // 8
    return made | {"mixed": mixed} | {f"sorted-{n}": ordered[n * each : (n + 1) * each] for n in range(8)}


def measured(
    post: Callable[[list[str]], Any], texts: Mapping[str, list[str]], seconds: float
) -> dict[str, list[float]]:
    """Each shape's requests, one behind the other, for so many seconds and twice at least."""
    times: dict[str, list[float]] = {}
    for name, some in texts.items():
        post(some)
        taken, end = [], time.perf_counter() + seconds
        while len(taken) < 2 or time.perf_counter() < end:
            begin = time.perf_counter()
            post(some)
            taken.append(time.perf_counter() - begin)
        times[name] = taken
    return times


class Connection:
    """A connection that is kept as long as the server does. Of an answer it reads the status, the length and whether
    more may be asked: what a client costs is no contestant's, and Python's own costs a twentieth of a short text.
    """

    def __init__(self, netloc: str) -> None:
        host, _, port = netloc.partition(":")
        self._address = (host, int(port))
        self._head = f"Host: {netloc}\r\nContent-Type: application/json\r\n"
        self._answers: BinaryIO | None = None

    def post(self, path: str, body: bytes) -> bytes:
        """The answer's body. Raises LookupError where its status is not 200, OSError."""
        if self._answers is None:
            self._socket = socket.create_connection(self._address, timeout=600)
            self._answers = self._socket.makefile("rb")
        head = f"POST {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)
        status, fields = self._answers.readline(), {}
        while (line := self._answers.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            fields[name.lower()] = value.strip()
        answer = self._answers.read(int(fields.get(b"content-length", 0)))
        if fields.get(b"connection", b"").lower() == b"close":
            self.close()
        if status.split()[1:2] != [b"200"]:
            raise LookupError(f"status {status!r}: {answer[:200]!r}")
        return answer

    def close(self) -> None:
        if self._answers is not None:
            self._answers.close()
            self._socket.close()
            self._answers = None


@contextmanager
def poster(url: str, path: str, key: str) -> Iterator[Callable[[list[str]], Any]]:
    """Asks on one connection, and decodes the answer."""
    connection = Connection(urlsplit(url).netloc)
    try:
        yield lambda texts: json.loads(connection.post(path, json.dumps({key: texts}).encode()))
    finally:
        connection.close()


async def run_ours(
    prepared: EmbedPrepared, texts: Mapping[str, list[str]], asked: argparse.Namespace, *flags: str
) -> Run:
    words = [f"--threads={asked.threads}", *flags]
    async with spawn(prepared.folder, dialect=DialectName.MLX, flags=words) as child:
        await child.wait_ready()
        with poster(child.url, "/embedding", "content") as post:
            first = await asyncio.to_thread(post, texts["1x16"])
            times = await asyncio.to_thread(measured, post, texts, asked.seconds)
        return Run(times, first["embeddings"][0], child.peak_memory_bytes() or 0)


def run_llama(server: Path, prepared: EmbedPrepared, texts: Mapping[str, list[str]], asked: argparse.Namespace) -> Run:
    """Raises LookupError."""
    if not server.exists():
        raise LookupError("`make bench-serve` builds llama.cpp's server")
    port, slots = free_port(), 8
    words = [str(server), "--model", str(prepared.gguf), "--port", str(port), "--embedding", "--pooling", "mean"]
    words += ["--threads", str(asked.threads), "--threads-batch", str(asked.threads), "--no-webui"]
    words += ["--parallel", str(slots), "--ctx-size", str(slots * LONGEST)]
    # Of 512, 1024, 2048 and 4096 tokens a pass of 512 was its fastest, or as fast as any.
    words += ["--batch-size", "2048", "--ubatch-size", str(LONGEST)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        await_health(process, port)
        with poster(url, "/v1/embeddings", "input") as post:
            first = post(texts["1x16"])
            times = measured(post, texts, asked.seconds)
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return Run(times, first["data"][0]["embedding"], peak)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def await_health(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Wait until llama-server answers, or ends. Raises LookupError."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        with suppress(subprocess.TimeoutExpired):
            raise LookupError(f"llama-server ended with {process.wait(ASKED_AGAIN_S)}")
    raise LookupError("llama-server did not come up")


def run_rival(backend: str, prepared: EmbedPrepared, texts: Path, asked: argparse.Namespace) -> Run:
    """Raises LookupError."""
    if prepared.no_rivals is not None:
        raise LookupError(prepared.no_rivals)
    words = ["tests.bench.run_embed_rival", f"--model={prepared.folder}", f"--texts={texts}", f"--backend={backend}"]
    words += [f"--threads={asked.threads}", f"--seconds={asked.seconds}"]
    return Run(**run_module(words, python=prepared.rivals_python, folder=REPOSITORY, threads=asked.threads))


def run_one(name: str, prepared: EmbedPrepared, file: Path, asked: argparse.Namespace) -> Run:
    """Raises LookupError."""
    texts = json.loads(file.read_text())
    if name in (TORCH, ONNX):
        return run_rival("torch" if name == TORCH else "onnx", prepared, file, asked)
    if name == LLAMA:
        server = cache_folder(os.environ) / "bench" / f"llama-server-{LLAMA_SERVER.partition('==')[2]}"
        return run_llama(server, prepared, texts, asked)
    flags = ("--weights=int8",) if name == OURS_INT8 else ()
    return asyncio.run(run_ours(prepared, texts, asked, *flags))


Rounds = Mapping[str, Mapping[int, Run]]
"""Each contestant's runs by round; a round in which it failed is missing."""


def goals(runs: Rounds) -> list[Goal]:
    """Ratios within each round; over the best, of the rounds in which all the others ran."""
    ours, torch = runs.get(OURS, {}), runs.get(TORCH, {})
    others = [runs[name] for name in (TORCH, ONNX, LLAMA) if runs.get(name)]
    found: list[Goal] = []
    for length in LENGTHS:
        for batch in BATCHES:
            rates = {turn: run.rate(batch, length) for turn, run in ours.items()}
            rivals = [{turn: run.rate(batch, length) for turn, run in each.items()} for each in others]
            shared = [turn for turn in rates if rivals and all(turn in each for each in rivals)]
            best = {turn: max(each[turn] for each in rivals) for turn in shared}
            found.append(Goal(f"over the best other, {batch} x {length} tokens", ratios(rates, best), 1.0))
            slow = {turn: run.rate(batch, length) for turn, run in torch.items()}
            found.append(Goal(f"over torch, {batch} x {length} tokens", ratios(rates, slow), 1.5))
    mixed = [mixed_over_sorted(run) for run in ours.values()]
    found.append(Goal("mixed lengths over sorted ones, seconds", mixed, 1.2, "<="))
    own, peaks = ({turn: float(run.peak_bytes) for turn, run in each.items()} for each in (ours, torch))
    found.append(Goal("memory over torch's", ratios(own, peaks), 1 / 3, "<="))
    return found


def mixed_over_sorted(run: Run) -> float:
    """Seconds for texts of mixed lengths at once over those for the same texts in eighths of like lengths."""
    return median(run.times["mixed"]) / sum(median(run.times[f"sorted-{n}"]) for n in range(8))


def cells(runs: Rounds) -> list[list[str]]:
    rows = []
    for name, made in runs.items():
        found = list(made.values())
        figures = [[run.rate(batch, length) for run in found] for length in LENGTHS for batch in BATCHES]
        figures.append([MIXED / median(run.times["mixed"]) for run in found])
        figures.append([run.peak_bytes / 2**20 for run in found])
        rows.append([LABELS[name], *(f"{median(each):.1f}" if each else "missing" for each in figures)])
    return rows


def agreement(runs: Rounds) -> dict[str, float]:
    """The cosine of each contestant's first vector and ours: those that do not agree do not compute alike."""
    firsts = {name: np.array(next(iter(made.values())).vector) for name, made in runs.items() if made}
    own = firsts.pop(OURS, None)
    if own is None:
        return {}
    return {name: float(own @ each / np.linalg.norm(own) / np.linalg.norm(each)) for name, each in firsts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.embed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each shape's requests")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contestants")
    asked = parser.parse_args()
    names = chosen(parser, asked.only, list(LABELS))
    prepared = prepare_embed(cache_folder(os.environ), say, rivals=bool({TORCH, ONNX} & set(names)))
    runs: dict[str, dict[int, Run]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "texts.json"
        write_texts(prepared.folder, file, shapes())
        for turn in range(1, asked.rounds + 1):
            for name in names:
                try:
                    runs[name][turn] = run_one(name, prepared, file, asked)
                except LookupError as error:
                    say(f"round {turn}  {name} failed: {error}")
                    continue
                say(f"round {turn}  {name}")
    head = ["texts/s", *(f"{batch} x {length}" for length in LENGTHS for batch in BATCHES), "64 mixed", "peak RSS, MiB"]
    raw = {name: {turn: run.times for turn, run in made.items()} for name, made in runs.items()}
    show("Embeddings", head, cells(runs), goals(runs), threads=asked.threads, cosines=agreement(runs), times=raw)


if __name__ == "__main__":
    main()
