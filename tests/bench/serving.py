"""`make bench-serve`: many requests at once, beside mlx_lm.server and llama-server; see README.md."""

import argparse
import asyncio
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from models.device import usable_cores
from runner.errors import RunnerError
from runner.folders import cache_folder
from tests.bench.__main__ import cpu_name, load_average, say
from tests.bench.commands import REPOSITORY, PreparationError
from tests.bench.contestants import PROMPT_LENGTHS
from tests.bench.load import QUICK, SHORT_TOKENS, SLOW, Plan, ServerRun, lengths, run_all, run_short_requests
from tests.bench.preparation import prepare
from tests.bench.servers import RUNNER, SERVERS, ServerContestant, start
from tests.bench.serving_preparation import ServingPrepared, prepare_serving
from tests.bench.serving_report import Round, to_json, to_markdown

BARE_TIMEOUT_S = 600
BARE_ROWS = (1, 16)
SMALL_CACHE_BYTES = 16 << 20
"""Of the prefix cache while memory is watched: it is full before the warm-up ends."""


async def run_server(contestant: ServerContestant, prepared: ServingPrepared, threads: int, plan: Plan) -> ServerRun:
    async with start(contestant, prepared, threads) as server:
        return await run_all(server, prepared.texts, SLOW if contestant.is_slow else plan)


async def run_memory(prepared: ServingPrepared, threads: int, plan: Plan) -> list[tuple[int, int]]:
    contestant = next(each for each in SERVERS if each.name == RUNNER)
    async with start(contestant, prepared, threads, [f"--cache-bytes={SMALL_CACHE_BYTES}"]) as server:
        return await run_short_requests(server, prepared.texts[SHORT_TOKENS], plan)


def run_bare(prepared: ServingPrepared, threads: int, plan: Plan) -> dict[int, float]:
    """The runner's model without the runner, in a process of its own."""
    base, count = prepared.base, str(threads)
    words = [str(base.project_python), "-m", "tests.bench.run_bare_rows", f"--model={base.gguf}"]
    words += [f"--texts={prepared.file}", f"--length={plan.prompt_tokens}", f"--tokens={plan.tokens}"]
    words += [f"--threads={threads}", "--rows", *map(str, BARE_ROWS)]
    env = os.environ | {"MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count}
    done = subprocess.run(
        words, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=BARE_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise LookupError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return {int(rows): rate for rows, rate in json.loads(done.stdout.splitlines()[-1]).items()}


def run_round(names: list[str], prepared: ServingPrepared, threads: int, plan: Plan, label: str) -> Round:
    """All contestants one after another; what fails is written down."""
    turn = Round()
    for contestant in SERVERS:
        if contestant.name not in names:
            continue
        try:
            run = asyncio.run(run_server(contestant, prepared, threads, plan))
        except (LookupError, OSError) as error:
            turn.failures[contestant.name] = str(error)
            say(f"{label}  {contestant.label:<34} failed: {error}")
            continue
        turn.servers[contestant.name] = run
        rates = [f"{count}: {each.decode_tok_s or 0:.0f}" for count, each in run.streams.items()]
        say(f"{label}  {contestant.label:<34} decode tok/s {', '.join(rates)} {'; '.join(run.notes)}")
        if contestant.name != RUNNER:
            continue
        # At once, for the speed of a shared machine drifts within minutes.
        try:
            turn.bare = run_bare(prepared, threads, plan)
            say(f"{label}  bare loop, decode tok/s {', '.join(f'{n}: {rate:.0f}' for n, rate in turn.bare.items())}")
        except (LookupError, subprocess.TimeoutExpired) as error:
            turn.failures["bare loop"] = str(error)
    if RUNNER in names:
        try:
            turn.memory = asyncio.run(run_memory(prepared, threads, plan))
            say(f"{label}  short requests: {len(turn.memory)} samples of memory")
        except* (LookupError, OSError) as group:
            turn.failures["short requests"] = str(group.exceptions[0])
    return turn


def write(out: Path, rounds: list[Round], facts: dict[str, object], prepared: ServingPrepared) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report, picture = out / "bench-serve.json", out / "bench-serve.png"
    report.write_text(json.dumps(to_json(rounds, facts), indent=1) + "\n")
    markdown = to_markdown(rounds, facts)
    words = [str(prepared.base.bench_python), "-m", "tests.bench.plot_serving"]
    words += [str(report.resolve()), str(picture.resolve())]
    drawn = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if drawn.returncode == 0:
        markdown += "\n![the figures as curves](bench-serve.png)\n"
    else:
        say(f"no plot: {(drawn.stderr.splitlines() or ['no reason given'])[-1]}")
    (out / "bench-serve.md").write_text(markdown)
    print(markdown)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="short prompts and few of everything: does it all run?")
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()), help="of every contestant (default 2)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contestants")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder of bench-serve.md, .json, .png")
    asked = parser.parse_args()
    known = [each.name for each in SERVERS]
    names = asked.only or known
    if unknown := set(names) - set(known):
        parser.error(f"no contestant {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    plan = QUICK if asked.quick else Plan()
    try:
        base = prepare(cache_folder(os.environ), PROMPT_LENGTHS, say)
        prepared = prepare_serving(base, tuple(sorted(lengths(plan) | lengths(SLOW))), say)
    except (PreparationError, RunnerError) as error:
        say(f"Error: {error}")
        return 1
    before, begin = load_average(), time.monotonic()
    count = asked.rounds or (1 if asked.quick else 3)
    rounds = [run_round(names, prepared, asked.threads, plan, f"round {turn + 1}/{count}") for turn in range(count)]
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "CPU": f"{cpu_name()}, {usable_cores()} usable cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "threads": asked.threads,
        "rounds": count,
        "prompt + decoded tokens": f"{plan.prompt_tokens} + {plan.tokens}"
        f" (mlx_lm.server as installed: {SLOW.prompt_tokens} + {SLOW.tokens})",
        "load average before": before,
        "load average after": load_average(),
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    if asked.quick:
        facts["**quick**"] = "a rehearsal; its figures are not for comparison"
    write(asked.out, rounds, facts, prepared)
    return 0 if any(turn.servers for turn in rounds) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
