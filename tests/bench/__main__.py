"""`make bench`: the runner beside the bare loop, mlx_lm and llama.cpp; see README.md in this folder."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from models.device import usable_cores
from runner.errors import RunnerError
from runner.folders import cache_folder
from tests.bench.commands import REPOSITORY, PreparationError
from tests.bench.contestants import DEFAULT_TOKENS, PROMPT_LENGTHS, Contestant, chosen, command, folder
from tests.bench.measurement import Measurement
from tests.bench.preparation import Prepared, prepare
from tests.bench.report import Outcome, to_json, to_markdown

CONTESTANT_TIMEOUT_S = 900


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_contestant(contestant: Contestant, prepared: Prepared, threads: int) -> Measurement:
    """Run it in a process of its own.

    Raises:
        LookupError: it cannot run here, or failed; the message says why.
    """
    count = str(threads)
    env = os.environ | {"MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count}
    try:
        done = subprocess.run(
            command(contestant, prepared, threads, time.monotonic()),
            cwd=folder(contestant, prepared),
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CONTESTANT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LookupError(f"not done after {CONTESTANT_TIMEOUT_S} s") from None
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not answers:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise LookupError(f"exit code {done.returncode}, last line: {said[-1] if said else 'none'}")
    return Measurement.from_json(answers[-1])


def run_rounds(outcomes: list[Outcome], prepared: Prepared, threads: int, rounds: int) -> None:
    """A B C …, A B C …: what changes on the machine over time changes for all."""
    for turn in range(1, rounds + 1):
        for outcome in outcomes:
            label = outcome.contestant.label
            try:
                run = run_contestant(outcome.contestant, prepared, threads)
            except LookupError as error:
                outcome.failures.append(f"round {turn}: {error}")
                say(f"round {turn}/{rounds}  {label:<34} failed: {error}")
                continue
            outcome.add(turn, run)
            say(
                f"round {turn}/{rounds}  {label:<34} decode {run.decode_tok_s:6.1f} tok/s, "
                f"prefill {run.prefill_tok_s:6.1f} tok/s, "
                f"load {run.load_s:5.1f} s, {run.peak_rss_bytes >> 20:5} MiB"
            )


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def load_average() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def write(out: Path, outcomes: list[Outcome], facts: dict[str, object], prepared: Prepared) -> None:
    out.mkdir(parents=True, exist_ok=True)
    by_name = {outcome.contestant.name: outcome for outcome in outcomes}
    report = out / "bench.json"
    report.write_text(json.dumps(to_json(by_name, facts), indent=2) + "\n")
    markdown = to_markdown(by_name, facts)
    words = [
        str(prepared.bench_python),
        "-m",
        "tests.bench.plot",
        str(report.resolve()),
        str((out / "bench.png").resolve()),
    ]
    drawn = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if drawn.returncode == 0:
        markdown += "\n![the table as bars](bench.png)\n"
    else:
        say(f"no plot: {(drawn.stderr.splitlines() or ['no reason given'])[-1]}")
    (out / "bench.md").write_text(markdown)
    print(markdown)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, help="decoded tokens of the contestants that are not slow"
    )
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), help="of every contestant (default: usable cores)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contestants")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-results"), help="folder of bench.md, bench.json, bench.png"
    )
    asked = parser.parse_args()
    if min(asked.rounds, asked.threads) < 1 or asked.tokens < 2:
        parser.error("at least one round, one thread and two tokens")
    try:
        outcomes = [Outcome(contestant) for contestant in chosen(asked.only, asked.tokens)]
        prepared = prepare(cache_folder(os.environ), PROMPT_LENGTHS, say)
    except (ValueError, PreparationError, RunnerError) as error:
        say(f"Error: {error}")
        return 1
    before, begin = load_average(), time.monotonic()
    run_rounds(outcomes, prepared, asked.threads, asked.rounds)
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "CPU": f"{cpu_name()}, {usable_cores()} usable cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "threads": asked.threads,
        "rounds": asked.rounds,
        "load average before": before,
        "load average after": load_average(),
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    write(asked.out, outcomes, facts, prepared)
    return 0 if any(outcome.runs for outcome in outcomes) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
