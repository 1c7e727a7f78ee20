"""What every contestant is asked and what it answers, and the one definition of each figure.

Runs in the interpreters of all contestants: the standard library only.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """What a contestant is to do."""

    model: Path
    text: str
    """The prompt, for a contestant that takes text; `ids` are exactly its tokens."""
    ids: list[int]
    warmup: str
    warmup_ids: list[int]
    """Another prompt, run before the clock: page faults and first-use set-up are not what is measured."""
    tokens: int
    """How many are to be decoded."""
    threads: int
    started: float
    """`time.monotonic` when the contestant's process was started."""
    blas: Path | None
    """A library to load before MLX."""
    float32: bool
    """Hold the weights and compute in float32, whatever the file has; read by this project's contestants."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one contestant. Durations in seconds, of `perf_counter` on the consuming side."""

    load_s: float
    """From the start of the process until the model can be asked."""
    first_token_s: float
    """From the request until the first token is in the consumer's hands."""
    decode_s: float
    """From the first token to the last: `tokens - 1` steps."""
    prompt_tokens: int
    tokens: int
    peak_rss_bytes: int
    text: str
    versions: dict[str, str]

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens over the time to the first token, so whatever a contestant does before it counts."""
        return self.prompt_tokens / self.first_token_s

    @property
    def decode_tok_s(self) -> float:
        """Steps a second after the first token."""
        return (self.tokens - 1) / self.decode_s

    @classmethod
    def from_json(cls, line: str) -> "Measurement":
        """Read what `answer` wrote."""
        return cls(**json.loads(line))


@dataclass(frozen=True, slots=True)
class Timed:
    """The pieces of a stream, and when they came."""

    first_token_s: float
    decode_s: float
    pieces: list[str]


def read_job() -> Job:
    """The job that the command line describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--prompt-tokens", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--started", type=float, required=True)
    parser.add_argument("--blas", type=Path)
    parser.add_argument("--float32", action="store_true")
    asked = parser.parse_args()
    prompts: Mapping[str, Any] = json.loads(asked.prompts.read_text())
    prompt, warmup = prompts[asked.prompt_tokens], prompts["warmup"]
    return Job(
        model=asked.model,
        text=prompt["text"],
        ids=prompt["ids"],
        warmup=warmup["text"],
        warmup_ids=warmup["ids"],
        tokens=asked.tokens,
        threads=asked.threads,
        started=asked.started,
        blas=asked.blas,
        float32=asked.float32,
    )


def time_stream(stream: Iterable[str]) -> Timed:
    """Consume a stream that yields once a token."""
    begin = time.perf_counter()
    first = last = begin
    pieces: list[str] = []
    for piece in stream:
        last = time.perf_counter()
        first = first if pieces else last
        pieces.append(piece)
    return Timed(first - begin, last - first, pieces)


def measure(
    job: Job, load_s: float, run: Callable[[list[int], int], Iterable[str]], versions: dict[str, str]
) -> Measurement:
    """Warm up, then time `run(prompt ids, tokens)`, whose iterator yields the text of one token at a time."""
    for _ in run(job.warmup_ids, 4):
        pass
    timed = time_stream(run(job.ids, job.tokens))
    return Measurement(
        load_s=load_s,
        first_token_s=timed.first_token_s,
        decode_s=timed.decode_s,
        prompt_tokens=len(job.ids),
        tokens=len(timed.pieces),
        peak_rss_bytes=peak_rss_bytes(),
        text="".join(timed.pieces),
        versions=versions,
    )


def peak_rss_bytes() -> int:
    """The most memory this process held."""
    if sys.platform == "linux":
        # Not getrusage: its figure is inherited from the process that forked this one.
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def answer(measurement: Measurement) -> None:
    """Write the one line that the bench reads."""
    print(json.dumps(asdict(measurement)), flush=True)
