"""What the single measurements share: their contestants' processes, their goals, and how they are told."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.commands import REPOSITORY
from tests.bench.preparation import Prepared
from tests.bench.report import Spread, table, verdict

TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class RowsContestant:
    """One that `run_rows` runs."""

    name: str
    label: str
    engine: str
    float32: bool = False


OURS, OURS_F32, LLAMA, LLAMA_F32 = "bare", "bare-f32", "llama-cpp", "llama-cpp-f32"
ROWS_CONTESTANTS = (
    RowsContestant(OURS, "bare executor, Q4_1 as it is", "onnx"),
    RowsContestant(OURS_F32, "bare executor, f32", "onnx", float32=True),
    RowsContestant(LLAMA, "llama.cpp, Q4_1 as it is", "llama.cpp"),
    RowsContestant(LLAMA_F32, "llama.cpp, F32", "llama.cpp", float32=True),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure with what it shall be; without a limit it is only told. None: it was not measured."""

    title: str
    values: Sequence[float]
    """Of the rounds."""
    limit: float | None = None
    at: str = ">="

    @property
    def spread(self) -> Spread | None:
        return Spread.of(list(self.values)) if self.values else None

    @property
    def word(self) -> str:
        return verdict(self.spread and self.spread.median, self.limit, self.at)


def say(text: str) -> None:
    """Tell it beside the table."""
    print(text, file=sys.stderr, flush=True)


def chosen(parser: argparse.ArgumentParser, names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those named, or all; the parser ends the program over a name that there is not."""
    if unknown := set(names or ()) - set(known):
        parser.error(f"no contestant {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [name for name in known if not names or name in names]


def run_module(
    words: Sequence[str], *, python: Path | str = sys.executable, folder: Path = REPOSITORY, threads: int = 1
) -> Any:
    """What `python -m …` says in its last line, as JSON.

    Raises:
        LookupError: it failed; the message is its last line.
    """
    count = str(threads)
    env = os.environ | {"MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count}
    try:
        done = subprocess.run(
            [str(python), "-m", *words],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LookupError(str(error)) from None
    if done.returncode != 0:
        raise LookupError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run_rows(contestant: RowsContestant, prepared: Prepared, threads: int, job: Sequence[str]) -> Any:
    """What one contestant says of a job of `run_rows`. Raises LookupError."""
    is_ours = contestant.engine == "onnx"
    if not is_ours and prepared.no_llama_cpp is not None:
        raise LookupError(prepared.no_llama_cpp)
    widened = contestant.float32 and not is_ours
    words = ["tests.bench.run_rows", *job, f"--engine={contestant.engine}", f"--threads={threads}"]
    words.append(f"--model={prepared.gguf_float32 if widened else prepared.gguf}")
    words += ["--float32"] if contestant.float32 else []
    return run_module(words, python=prepared.project_python if is_ours else prepared.bench_python, threads=threads)


def ratios(ours: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """One figure over another, of the rounds in which there are both."""
    return [ours[turn] / others[turn] for turn in sorted(ours.keys() & others.keys())]


def show(
    title: str, head: Sequence[str], cells: Sequence[Sequence[str]], goals: Sequence[Goal], **more: object
) -> None:
    """Print the table, the goals, and as the last line everything as JSON."""
    print("\n".join([f"# {title}", "", *table(list(head), [list(row) for row in cells]), ""]))
    told = [
        [
            goal.title,
            goal.spread.text() if goal.spread else "",
            "" if goal.limit is None else f"{goal.at} {goal.limit:g}",
            goal.word,
        ]
        for goal in goals
    ]
    print("\n".join([*table(["figure", "", "goal", ""], told), ""]))
    listed = [
        {
            "title": goal.title,
            "values": list(goal.values),
            "limit": goal.limit,
            "at": goal.at,
            "verdict": goal.word.strip("*"),
        }
        for goal in goals
    ]
    print(json.dumps({"title": title, "goals": listed, **more}), flush=True)
