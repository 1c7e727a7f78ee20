"""`make bench-image`: the image runner beside diffusers on torch and mflux; see README.md in this folder."""

import argparse
import asyncio
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from models.device import usable_cores
from runner.folders import cache_folder
from tests.bench.__main__ import cpu_name, load_average, say
from tests.bench.commands import REPOSITORY, PreparationError
from tests.bench.image_checkpoint import PROMPT, SEED, SIDE
from tests.bench.image_contestants import (
    RUNNER,
    STEPS,
    ImageContestant,
    ImagePrepared,
    chosen_images,
    image_command,
    prepare_images,
)
from tests.bench.image_measurement import ImageMeasurement
from tests.bench.image_report import ImageOutcome, to_json, to_markdown
from tests.bench.image_sections import SECTIONS, Section, soak_lines
from tests.bench.image_soak import SoakResult, soak

TIMEOUT_S = 600
QUICK_STEPS = 1
SOAK_REQUESTS = 300


def run_json(words: Sequence[str], threads: int) -> str:
    """Run a process that answers with one line of JSON; the line.

    Raises:
        LookupError: it failed; the message says why.
    """
    count = str(threads)
    env = os.environ | {"MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count}
    try:
        done = subprocess.run(
            words,
            cwd=REPOSITORY,
            env=env | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LookupError(f"not done after {TIMEOUT_S} s") from None
    except OSError as error:
        raise LookupError(str(error)) from error
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not answers:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise LookupError(f"exit code {done.returncode}, last line: {said[-1] if said else 'none'}")
    return answers[-1]


def run_contestant(
    outcome: ImageOutcome, prepared: ImagePrepared, threads: int, steps: int, save: Path
) -> ImageMeasurement:
    """Run it in a process of its own, and keep its outputs.

    Raises:
        LookupError: it cannot run here, or failed; the message says why.
    """
    contestant = outcome.contestant
    job: dict[str, object] = {"prompt": PROMPT, "seed": SEED, "side": SIDE, "steps": steps, "save": save}
    job |= {"threads": contestant.threads or threads, "started": time.monotonic()}
    measurement = ImageMeasurement.from_json(
        run_json(image_command(contestant, prepared, job), contestant.threads or threads)
    )
    with np.load(save) as outputs:
        outcome.outputs = dict(outputs)
    return measurement


def run_rounds(outcomes: list[ImageOutcome], prepared: ImagePrepared, threads: int, rounds: int, steps: int) -> None:
    """A B C …, A B C …: what changes on the machine over time changes for all."""
    with TemporaryDirectory() as place:
        for turn in range(1, rounds + 1):
            for outcome in outcomes:
                if turn <= (outcome.contestant.rounds or rounds):
                    _run_turn(outcome, f"round {turn}/{rounds}", turn, prepared, threads, steps, Path(place))


def _run_turn(
    outcome: ImageOutcome, title: str, turn: int, prepared: ImagePrepared, threads: int, steps: int, place: Path
) -> None:
    label = outcome.contestant.label
    try:
        run = run_contestant(outcome, prepared, threads, steps, place / "outputs.npz")
    except LookupError as error:
        outcome.failures.append(f"round {turn}: {error}")
        say(f"{title}  {label:<24} failed: {error}")
        return
    outcome.runs[turn] = run
    said = [f"load {run.load_s:.1f} s", f"steps {' '.join(f'{taken:.2f}' for taken in run.step_s)} s"]
    said += [f"{name} {value:.1f} s" for name, value in (("decode", run.decode_s), ("encode", run.encode_s)) if value]
    said += [f"{run.peak_rss_bytes >> 20} MiB"] if run.peak_rss_bytes else []
    say(f"{title}  {label:<24} {', '.join(said)}")


def run_sections(prepared: ImagePrepared, threads: int) -> dict[str, dict[str, object]]:
    """What is measured of the runner alone, each in a process of its own; one that fails says so."""
    found: dict[str, dict[str, object]] = {}
    for section in SECTIONS:
        say(f"{section.title} …")
        words = [str(prepared.pythons["project"]), "-m", f"tests.bench.{section.module}"]
        try:
            found[section.name] = json.loads(
                run_json([*words, f"--pipeline={prepared.pipeline}", f"--threads={threads}"], threads)
            )
        except LookupError as error:
            found[section.name] = {"failed": str(error)}
            say(f"{section.title} failed: {error}")
    return found


def run_soak(requests: int, threads: int) -> SoakResult:
    """Many small pictures on end."""
    say(f"{requests} small pictures …")
    result = SoakResult()
    try:
        result = asyncio.run(soak(requests, threads))
    except* (LookupError, OSError) as group:
        result.failure = str(group.exceptions[0])
        say(f"the soak failed: {result.failure}")
    return result


def write(out: Path, report: dict[str, object], markdown: str, python: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file, picture = out / "bench-image.json", out / "bench-image.png"
    file.write_text(json.dumps(report, indent=1) + "\n")
    words = [str(python), "-m", "tests.bench.plot_image", str(file.resolve()), str(picture.resolve())]
    drawn = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if drawn.returncode == 0:
        markdown += "\n![the table as bars](bench-image.png)\n"
    else:
        say(f"no plot: {(drawn.stderr.splitlines() or ['no reason given'])[-1]}")
    (out / "bench-image.md").write_text(markdown)
    print(markdown)


def parse(known: Sequence[ImageContestant]) -> argparse.Namespace:
    names = ", ".join(contestant.name for contestant in known)
    parser = argparse.ArgumentParser(prog="python -m tests.bench.image", description=__doc__)
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="one step of everything: does it all run?")
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()), help="of every contestant (default 2)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"only these contestants, of {names}")
    parser.add_argument(
        "--soak", type=int, metavar="N", help=f"small pictures on end (default {SOAK_REQUESTS}; 0: none)"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder of bench-image.md, .json, .png")
    asked = parser.parse_args()
    asked.rounds = asked.rounds or (1 if asked.quick else 3)
    asked.soak = asked.soak if asked.soak is not None else (10 if asked.quick else SOAK_REQUESTS)
    if asked.rounds < 1 or asked.threads < 1:
        parser.error("at least one round and one thread")
    return asked


def main() -> int:
    asked = parse(chosen_images(None))
    try:
        outcomes = [ImageOutcome(contestant) for contestant in chosen_images(asked.only)]
        prepared = prepare_images(cache_folder(os.environ), os.environ, say)
    except (ValueError, PreparationError) as error:
        say(f"Error: {error}")
        return 1
    before, begin = load_average(), time.monotonic()
    steps = QUICK_STEPS if asked.quick else STEPS
    run_rounds(outcomes, prepared, asked.threads, asked.rounds, steps)
    by_name = {outcome.contestant.name: outcome for outcome in outcomes}
    found = run_sections(prepared, asked.threads) if RUNNER in by_name and not asked.quick else {}
    soaked = run_soak(asked.soak, asked.threads) if RUNNER in by_name and asked.soak else None
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "CPU": f"{cpu_name()}, {usable_cores()} usable cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "threads": asked.threads,
        "rounds": f"{asked.rounds}, timed steps in each: {steps}",
        "load average before": before,
        "load average after": load_average(),
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    if asked.quick:
        facts["**quick**"] = "a rehearsal; its figures are not for comparison"
    lines = [line for section in SECTIONS if section.name in found for line in _section(section, found[section.name])]
    lines += [] if soaked is None else soak_lines(soaked)
    report = to_json(by_name, facts) | {"sections": found, "soak": None if soaked is None else soaked.to_json()}
    write(asked.out, report, to_markdown(by_name, facts, lines), prepared.pythons["diffusers"])
    return 0 if any(outcome.runs for outcome in outcomes) else 1


def _section(section: Section, found: dict[str, object]) -> list[str]:
    lines = [f"failed: {found['failed']}"] if "failed" in found else section.lines(found)
    return [f"## {section.title}", "", *lines, ""]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
