"""Pictures in a prompt: from the request to the first token, once and again, and the vision tower alone."""

import argparse
import asyncio
import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from models.device import usable_cores
from runner.config import DialectName, cache_folder
from runner.parent import free_port, spawn
from tests.bench.commands import PreparationError, once, python_in, run
from tests.bench.embed import await_health
from tests.bench.figures import Goal, chosen, ratios, run_module, say, show
from tests.bench.serving_preparation import LLAMA_SERVER
from tests.bench.vision_checkpoint import SIDE, write
from tests.bench.vision_twins import MODEL, PROJECTOR

OURS, TORCH, LLAMA = "runner", "torch", "llama"
LABELS = {
    OURS: "this runner, float32, over HTTP",
    TORCH: "transformers on torch, in process",
    LLAMA: "llama-server with a projector, F32, over HTTP",
}
QUESTIONS = ("she sells", "and then the other fox said")
RIVALS = ("torch==2.15.0", "transformers==5.24.0", "pillow")
MARKER = "<__media__>"
_LOGGED = re.compile(r"(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) ")
"""How llama.cpp's log tells the time since its start."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One contestant: seconds to the first token of a question and of a second one on the same picture."""

    first_s: float
    again_s: float
    peak_bytes: int
    tower_s: float | None = None
    """None: it does not tell."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything is."""

    folder: Path
    twins: Path
    picture: Path
    rival: Path
    """A Python that has torch and transformers."""


def prepare(cache: Path, asked: argparse.Namespace, names: list[str]) -> Place:
    """Make what is missing. Raises PreparationError."""
    base = cache / "bench"
    base.mkdir(parents=True, exist_ok=True)
    folder, twins, picture = (base / f"vision-400m{end}" for end in ("", "-gguf", ".png"))
    once(folder, say, "writing a model with a tower of 400M parameters (once; 2 GB)", write)
    if LLAMA in names:
        words = [sys.executable, "-m", "tests.bench.vision_twins", str(folder)]
        once(twins, say, "writing it for llama.cpp (once; 2 GB)", lambda target: run([*words, str(target)]))
    once(picture, say, "drawing a picture", _draw)
    venv = base / "vision-venv"
    if TORCH in names and asked.rival_python is None and not (venv / ".installed").exists():
        say(f"installing {' '.join(RIVALS)} (once; several GB)")
        run([sys.executable, "-m", "venv", str(venv)])
        run([str(python_in(venv)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *RIVALS])
        (venv / ".installed").touch()
    return Place(folder, twins, picture, asked.rival_python or python_in(venv))


def _draw(target: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(target, "PNG")


def seconds_to_first(url: str, path: str, body: object) -> float:
    """From a request to the first line of its answer. Raises LookupError."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=1200)
    begin = time.perf_counter()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    line = answer.readline()
    taken = time.perf_counter() - begin
    connection.close()
    if answer.status != 200:
        raise LookupError(f"status {answer.status}: {line[:200]!r}")
    return taken


async def run_ours(place: Place, asked: argparse.Namespace) -> Seen:
    data = base64.b64encode(place.picture.read_bytes()).decode()
    async with spawn(place.folder, dialect=DialectName.MLX, flags=[f"--threads={asked.threads}"]) as child:
        await child.wait_ready()
        taken = []
        for question in QUESTIONS:
            body = {
                "Prompt": f"[img-0] {question}",
                "Media": [{"data": data, "id": 0}],
                "Options": {"num_predict": 1, "temperature": 0},
            }
            taken.append(await asyncio.to_thread(seconds_to_first, child.url, "/v1/completions", body))
        peak = child.peak_memory_bytes() or 0
    words = ["tests.bench.vision", f"--tower={place.folder}", f"--threads={asked.threads}"]
    return Seen(*taken, peak, run_module(words)["tower_s"])


def tower_alone(folder: Path, threads: int) -> None:
    """Have the tower look at the picture twice in this process; one line of JSON has the second time."""
    from models.checkpoint import open_checkpoint
    from models.executors.onnx.tower import load_tower
    from models.tokenizer import load_tokenizer
    from models.vision import family_of

    checkpoint = open_checkpoint(str(folder), Path())
    tokenizer, family = load_tokenizer(checkpoint), family_of(checkpoint)
    assert family is not None
    vision = family.build(checkpoint, lambda text: tokenizer.encode(text, add_bos=False))
    encoder = load_tower(checkpoint, vision.tower, threads=threads)
    prepared = vision.prepare(np.asarray(Image.open(folder.with_name(f"{folder.name}.png"))))
    for _ in range(2):
        begin = time.perf_counter()
        for _ in encoder.encode(prepared.passes):
            pass
        taken = time.perf_counter() - begin
    print(json.dumps({"tower_s": taken}))


def run_llama(place: Place, asked: argparse.Namespace) -> Seen:
    """Raises LookupError."""
    server = cache_folder(os.environ) / "bench" / f"llama-server-{LLAMA_SERVER.partition('==')[2]}"
    if not server.exists():
        raise LookupError("`make bench-serve` builds llama.cpp's server")
    port = free_port()
    words = [str(server), "--model", str(place.twins / MODEL), "--mmproj", str(place.twins / PROJECTOR)]
    words += ["--port", str(port), "--threads", str(asked.threads), "--threads-batch", str(asked.threads)]
    words += ["--no-webui", "--ctx-size", "2048", "--parallel", "1", "--log-verbosity", "4"]
    env = os.environ | {"LLAMA_MEDIA_MARKER": MARKER}
    data = base64.b64encode(place.picture.read_bytes()).decode()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            return _asked_of_llama(process, port, data, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _asked_of_llama(process: "subprocess.Popen[bytes]", port: int, data: str, log: TextIO) -> Seen:
    await_health(process, port)
    taken = []
    for question in QUESTIONS:
        prompt = {"prompt_string": f"{MARKER} {question}", "multimodal_data": [data]}
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": True, "stream": True}
        taken.append(seconds_to_first(f"http://127.0.0.1:{port}", "/completion", body))
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    log.seek(0)
    return Seen(*taken, peak, encoding_seconds(log.read()))


def encoding_seconds(log: str) -> float | None:
    """What llama-server took last to encode a picture, by the times of its log's lines; None: they are not there."""
    begun, taken = None, None
    for line in log.splitlines():
        if (time_of_day := _LOGGED.match(line)) is None:
            continue
        minutes, seconds, milliseconds, microseconds = map(int, time_of_day.groups())
        now = 60 * minutes + seconds + milliseconds / 1e3 + microseconds / 1e6
        if "encoding mtmd batch" in line:
            begun = now
        elif begun is not None:
            begun, taken = None, now - begun
    return taken


def run_one(name: str, place: Place, asked: argparse.Namespace) -> Seen:
    """Raises LookupError."""
    if name == OURS:
        return asyncio.run(run_ours(place, asked))
    if name == LLAMA:
        return run_llama(place, asked)
    words = ["tests.bench.run_vision_rival", f"--model={place.folder}", f"--picture={place.picture}"]
    words += ["--question", *QUESTIONS, f"--threads={asked.threads}"]
    return Seen(**run_module(words, python=place.rival, threads=asked.threads))


Rounds = Mapping[str, Mapping[int, Seen]]
"""Each contestant's runs by round; a round in which it failed is missing."""


def goals(runs: Rounds) -> list[Goal]:
    """Ratios within each round."""
    ours = runs.get(OURS, {})
    found = []
    for name in (TORCH, LLAMA):
        rivals = runs.get(name, {})
        own = {turn: seen.first_s for turn, seen in ours.items()}
        theirs = {turn: seen.first_s for turn, seen in rivals.items()}
        found.append(Goal(f"{name}'s time to the first token over ours", ratios(theirs, own), 1.0))
        towers = {turn: seen.tower_s for turn, seen in rivals.items() if seen.tower_s is not None}
        own = {turn: seen.tower_s for turn, seen in ours.items() if seen.tower_s is not None}
        found.append(Goal(f"{name}'s time for the tower alone over ours", ratios(towers, own), 1.0))
    again = [seen.first_s / seen.again_s for seen in ours.values()]
    found.append(Goal("a first question's first token over a second one's", again, 5.0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vision", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contestants")
    parser.add_argument(
        "--rival-python", type=Path, help="a Python with torch and transformers; default: installed once"
    )
    parser.add_argument("--tower", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.tower is not None:
        tower_alone(asked.tower, asked.threads)
        return
    names = chosen(parser, asked.only, list(LABELS))
    try:
        place = prepare(cache_folder(os.environ), asked, names)
    except PreparationError as error:
        parser.error(str(error))
    runs: dict[str, dict[int, Seen]] = {name: {} for name in names}
    for turn in range(1, asked.rounds + 1):
        for name in names:
            try:
                runs[name][turn] = run_one(name, place, asked)
            except LookupError as error:
                say(f"round {turn}  {name} failed: {error}")
                continue
            say(f"round {turn}  {name}: {runs[name][turn]}")
    cells = [
        [
            LABELS[name],
            f"{seen.first_s:.2f}",
            f"{seen.again_s:.2f}",
            "" if seen.tower_s is None else f"{seen.tower_s:.2f}",
            f"{seen.peak_bytes / 2**20:.0f}",
        ]
        for name, made in runs.items()
        for seen in made.values()
    ]
    head = ["seconds", "first token", "second question", "tower alone", "peak RSS, MiB"]
    show("Vision", head, cells, goals(runs), threads=asked.threads)


if __name__ == "__main__":
    main()
