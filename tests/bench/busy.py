"""Steps beside other busy processes: none, one and two, of the bare executor and of llama.cpp."""

import argparse
import os

from models.device import usable_cores
from runner.folders import cache_folder
from tests.bench.contestants import PROMPT_LENGTHS
from tests.bench.figures import LLAMA, OURS, ROWS_CONTESTANTS, Goal, chosen, ratios, run_rows, say, show
from tests.bench.preparation import prepare
from tests.bench.report import Spread

ROWS, OTHERS, STEPS, ROUNDS = (1, 8), (0, 1, 2), 60, 3
AT_MOST = {1: 2.0, 2: 4.0}
"""Times the quiet step, by the number of other busy processes."""
LABELS = {each.name: each.label for each in ROWS_CONTESTANTS if each.name in (OURS, LLAMA)}
Steps = dict[tuple[int, int], dict[int, float]]
"""Milliseconds a step by other processes and rows, and by round."""


def goals(measured: dict[str, Steps]) -> list[Goal]:
    """How much slower than quiet each is, and both in the same state."""
    ours, theirs = measured.get(OURS, {}), measured.get(LLAMA, {})
    found = []
    for others, limit in AT_MOST.items():
        for rows in ROWS:
            state = f"rows: {rows}, other busy processes: {others}"
            values = ratios(ours.get((others, rows), {}), ours.get((0, rows), {}))
            found.append(Goal(f"step over the quiet one, {state}", values, limit, "<="))
            values = ratios(theirs.get((others, rows), {}), theirs.get((0, rows), {}))
            found.append(Goal(f"llama.cpp's over its quiet one, {state}", values))
    for others in OTHERS:
        for rows in ROWS:
            values = ratios(theirs.get((others, rows), {}), ours.get((others, rows), {}))
            limit = 1.0 if others else None
            found.append(
                Goal(f"llama.cpp's step over ours, rows: {rows}, other busy processes: {others}", values, limit)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.busy", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contestants")
    asked = parser.parse_args()
    measured: dict[str, Steps] = {name: {} for name in chosen(parser, asked.only, list(LABELS))}
    prepared = prepare(cache_folder(os.environ), PROMPT_LENGTHS, say)
    job = ["busy", f"--steps={asked.steps}", "--rows", *map(str, ROWS), "--others", *map(str, OTHERS)]
    for turn in range(1, asked.rounds + 1):
        for name, steps in measured.items():
            contestant = next(each for each in ROWS_CONTESTANTS if each.name == name)
            try:
                said = run_rows(contestant, prepared, asked.threads, job)["ms"]
            except LookupError as error:
                say(f"round {turn}  {name} failed: {error}")
                continue
            for others, of in said.items():
                for rows, each in of.items():
                    steps.setdefault((int(others), int(rows)), {})[turn] = each
            say(f"round {turn}  {name:<10} {said}")
    places = [(others, rows) for rows in ROWS for others in OTHERS]
    cells = [
        [LABELS[name], *(Spread.of(list(steps[place].values())).text() if place in steps else "" for place in places)]
        for name, steps in measured.items()
    ]
    head = ["ms a step", *(f"rows: {rows}, others: {others}" for others, rows in places)]
    raw = {name: [[*place, by_round] for place, by_round in steps.items()] for name, steps in measured.items()}
    show("Beside busy processes", head, cells, goals(measured), threads=asked.threads, ms=raw)


if __name__ == "__main__":
    main()
