"""What a draw costs on the host, as a share of the decode step that it follows."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from models.checkpoint import open_checkpoint
from models.device import usable_cores
from models.executors.onnx.executor import HostLogits
from models.sampling import Draw, Sampling, TokenCounts, uniform
from models.tokenizer import load_tokenizer
from runner.default_model import fetch
from runner.folders import cache_folder
from tests.bench.bare import BareRows
from tests.bench.figures import Goal, show
from tests.bench.preparation import PROMPT
from tests.bench.rows import step_ms

ROWS, DEPTH, STEPS, DRAWS = (1, 16), 128, 32, 40
PENALTY_WINDOW = 64
MOST_OF_STEP = 5.0
"""Per cent."""
APART = 20
OFF = Sampling(temperature=1.0, top_k=0, top_p=1.0)
CASES: tuple[tuple[str, Sampling, int | None], ...] = (
    ("greedy", Sampling(temperature=0), None),
    ("greedy, logprobs", Sampling(temperature=0), 5),
    ("temperature", OFF, None),
    ("top_k 40", Sampling(top_k=40, top_p=1.0), None),
    ("top_p 0.9", Sampling(top_k=0, top_p=0.9), None),
    ("min_p 0.05", Sampling(top_k=0, top_p=1.0, min_p=0.05), None),
    ("top_k 40, top_p 0.9", Sampling(), None),
    ("top_p 0.9, min_p 0.05", Sampling(top_k=0, min_p=0.05), None),
    ("typical_p 0.9", Sampling(top_k=0, top_p=1.0, typical_p=0.9), None),
    ("penalties, greedy", Sampling(temperature=0, repeat_penalty=1.1, presence_penalty=0.5), None),
    ("penalties, top_k 40, top_p 0.9", Sampling(repeat_penalty=1.1, frequency_penalty=0.2), None),
    ("everything, logprobs", Sampling(min_p=0.05, repeat_penalty=1.1, presence_penalty=0.5), 5),
)


def prompt_ids(model: Path) -> list[int]:
    tokenizer = load_tokenizer(open_checkpoint(str(model), Path()))
    return tokenizer.encode(PROMPT.read_text(), add_bos=tokenizer.adds_bos)


def median_us(work: Callable[[int], object], times: int) -> float:
    """Microseconds of `work(turn)`."""
    taken = []
    for turn in range(times):
        begin = time.perf_counter()
        work(turn)
        taken.append(time.perf_counter() - begin)
    return 1e6 * median(taken)


def draw_us(
    rows: BareRows, logits: npt.NDArray[np.float32], sampling: Sampling, top: int | None, seen: list[int]
) -> float:
    """Microseconds of a draw for each row of the logits, all with the same sampling."""
    counts = [TokenCounts(seen, PENALTY_WINDOW) if sampling.has_penalties else None for _ in logits]
    held = HostLogits(logits)

    def work(turn: int) -> None:
        draws = [
            Draw(sampling, uniform(row, turn), slot=row, counts=each, top_logprobs=top)
            for row, each in enumerate(counts)
        ]
        rows.executor.sample(held, draws)

    work(0)
    return median_us(work, DRAWS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sampling", description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    asked = parser.parse_args()
    model = fetch(cache_folder(os.environ), lambda _: None)
    row_tokens = DEPTH + STEPS + 8
    rows = BareRows.open(model, float32=False, rows=max(ROWS), row_tokens=row_tokens, threads=asked.threads)
    words = prompt_ids(model)
    for row in range(max(ROWS)):
        # Real text, for what a draw costs depends on how sure the model is.
        rows.prefill(row, 0, words[APART * row :][:DEPTH])
    step_us: dict[int, float] = {}
    costs: dict[str, dict[int, float]] = {title: {} for title, _, _ in CASES}
    for count in ROWS:
        step_us[count] = 1000 * step_ms(rows, count, DEPTH, STEPS)
        logits = rows.logits([(row, DEPTH, words[APART * row + DEPTH]) for row in range(count)])
        for title, sampling, top in CASES:
            costs[title][count] = draw_us(rows, logits, sampling, top, words[:PENALTY_WINDOW])
    cells = [["decode step", *(f"{step_us[count]:.0f}" for count in ROWS)]]
    cells += [
        [title, *(f"{us[count]:.0f} ({100 * us[count] / step_us[count]:.1f} %)" for count in ROWS)]
        for title, us in costs.items()
    ]
    goals = []
    for count in ROWS:
        title = max(costs, key=lambda each, count=count: costs[each][count])
        share = 100 * costs[title][count] / step_us[count]
        goals.append(Goal(f"the dearest ({title}), rows: {count}, per cent of a step", [share], MOST_OF_STEP, "<="))
    head = ["microseconds", *(f"rows: {count}" for count in ROWS)]
    show("Sampling", head, cells, goals, step_us=step_us, costs=costs)


if __name__ == "__main__":
    main()
