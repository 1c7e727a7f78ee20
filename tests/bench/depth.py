"""Decoding behind long texts: 1 to 8 rows at several depths, and a long prompt, beside llama.cpp and release 0.1.0."""

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from models.device import usable_cores
from runner.folders import cache_folder
from tests.bench.commands import PreparationError, run
from tests.bench.contestants import PROMPT_LENGTHS, RELEASE
from tests.bench.figures import (
    LLAMA,
    LLAMA_F32,
    OURS,
    OURS_F32,
    ROWS_CONTESTANTS,
    Goal,
    chosen,
    ratios,
    run_module,
    run_rows,
    say,
    show,
)
from tests.bench.preparation import WARMUP, Prepared, exporter, prepare
from tests.bench.rows import random_ids

DEPTHS, ROWS, STEPS, ROUNDS = (128, 1024, 4096), (1, 2, 4, 8), 32, 3
LABELS = {each.name: each.label for each in ROWS_CONTESTANTS} | {RELEASE: "bare loop of 0.1.0, f32"}


@dataclass(slots=True)
class Depths:
    """One contestant's tokens a second, by round."""

    decode: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)
    """By depth and rows."""
    prefill: dict[int, float] = field(default_factory=dict)

    def add(self, turn: int, decode: dict[tuple[int, int], float], prefill: float) -> None:
        for key, rate in decode.items():
            self.decode.setdefault(key, {})[turn] = rate
        self.prefill[turn] = prefill


def rates_of(ms: dict[str, dict[str, float]]) -> dict[tuple[int, int], float]:
    """Tokens a second over all rows from milliseconds a step, by depth and rows."""
    return {(int(depth), int(rows)): 1000 * int(rows) / each for depth, of in ms.items() for rows, each in of.items()}


def run_release(prepared: Prepared, asked: argparse.Namespace) -> tuple[dict[tuple[int, int], float], float]:
    """The release's own bare loops, in its own environment. Raises LookupError."""
    release = prepared.release
    if release.missing is not None:
        raise LookupError(release.missing)
    deepest, place = max(asked.depths), {"python": release.python, "folder": release.folder, "threads": asked.threads}
    decode: dict[tuple[int, int], float] = {}
    with TemporaryDirectory() as temporary:
        texts, prompts = Path(temporary, "texts.json"), Path(temporary, "prompts.json")
        count = ["--texts", str(max(asked.rows))]
        run([*exporter("serving", prepared), str(texts), *map(str, asked.depths), *count])
        long = {"text": "", "ids": random_ids(0, deepest)}
        warmup = {"text": WARMUP, "ids": random_ids(1, 16)}
        prompts.write_text(json.dumps({str(deepest): long, "warmup": warmup}))
        common = [f"--model={prepared.gguf}", f"--threads={asked.threads}"]
        for depth in asked.depths:
            words = ["tests.bench.run_bare_rows", *common, f"--texts={texts}", f"--length={depth}"]
            words += [f"--tokens={asked.steps}", "--rows", *map(str, asked.rows)]
            rates = run_module(words, **place)
            decode |= {(depth, int(rows)): rate for rows, rate in rates.items()}
        words = ["tests.bench.run_bare", *common, f"--prompts={prompts}", f"--prompt-tokens={deepest}", "--tokens=2"]
        first_s = run_module([*words, f"--started={time.monotonic()}"], **place)["first_token_s"]
    return decode, deepest / first_s


def run_one(name: str, prepared: Prepared, asked: argparse.Namespace) -> tuple[dict[tuple[int, int], float], float]:
    """Decoded tokens a second by depth and rows, and the prompt's. Raises LookupError."""
    if name == RELEASE:
        return run_release(prepared, asked)
    job = ["depth", f"--steps={asked.steps}", "--rows", *map(str, asked.rows), "--depths", *map(str, asked.depths)]
    contestant = next(each for each in ROWS_CONTESTANTS if each.name == name)
    said = run_rows(contestant, prepared, asked.threads, job)
    return rates_of(said["ms"]), said["prefill_tok_s"]


def goals(measured: dict[str, Depths]) -> list[Goal]:
    """Ratios within each round; nothing is asked of them but to be told."""
    pairs = ((OURS, LLAMA), (OURS, LLAMA_F32), (OURS_F32, LLAMA_F32), (OURS_F32, RELEASE))
    found = []
    for ours, other in pairs:
        if ours not in measured or other not in measured:
            continue
        one, two = measured[ours], measured[other]
        title = f"{LABELS[ours]} over {LABELS[other]}"
        for depth, rows in sorted(one.decode.keys() & two.decode.keys()):
            values = ratios(one.decode[depth, rows], two.decode[depth, rows])
            found.append(Goal(f"{title}, rows: {rows}, depth {depth}", values))
        found.append(Goal(f"{title}, prefill", ratios(one.prefill, two.prefill)))
    return found


def cells(measured: dict[str, Depths], asked: argparse.Namespace) -> list[list[str]]:
    def text(rates: dict[int, float]) -> str:
        return f"{median(rates.values()):.0f}" if rates else "missing"

    places = [(depth, rows) for depth in asked.depths for rows in asked.rows]
    return [
        [LABELS[name], *(text(each.decode.get(place, {})) for place in places), text(each.prefill)]
        for name, each in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.depth", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contestants")
    asked = parser.parse_args()
    measured = {name: Depths() for name in chosen(parser, asked.only, list(LABELS))}
    prepared = prepare(cache_folder(os.environ), PROMPT_LENGTHS, say)
    for turn in range(1, asked.rounds + 1):
        for name, each in measured.items():
            try:
                decode, prefill = run_one(name, prepared, asked)
            except (LookupError, PreparationError) as error:
                say(f"round {turn}  {name} failed: {error}")
                continue
            each.add(turn, decode, prefill)
            say(f"round {turn}  {name:<14} {', '.join(f'{rate:.0f}' for rate in decode.values())}; {prefill:.0f}")
    head = ["tok/s", *(f"rows: {rows}, depth {depth}" for depth in asked.depths for rows in asked.rows)]
    head.append(f"prefill {max(asked.depths)}")
    raw = {
        name: {
            "decode": [[*place, rates] for place, rates in each.decode.items()],
            "prefill": each.prefill,
        }
        for name, each in measured.items()
    }
    show("Depth", head, cells(measured, asked), goals(measured), threads=asked.threads, rates=raw)


if __name__ == "__main__":
    main()
