"""Contestant of `depth`, `busy` and `quality`: the executor or llama.cpp with several rows; one line of JSON."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.rows import Rows, fill, prefill_tok_s, step_ms

WARMUP_TOKENS = 64


def open_rows(asked: argparse.Namespace, rows: int, row_tokens: int) -> Rows:
    """The model, in the interpreter that has its library."""
    if asked.engine == "llama.cpp":
        from tests.bench.run_llama_cpp import Llama

        return Llama(asked.model, rows=rows, row_tokens=row_tokens, threads=asked.threads)
    from tests.bench.bare import BareRows

    return BareRows.open(asked.model, float32=asked.float32, rows=rows, row_tokens=row_tokens, threads=asked.threads)


def run_depth(asked: argparse.Namespace) -> dict[str, object]:
    """Milliseconds a step by depth and number of rows, and the tokens a second of a prompt of the greatest depth."""
    deepest, held = max(asked.depths), 0
    rows = open_rows(asked, max(asked.rows), deepest + asked.steps + WARMUP_TOKENS)
    fill(rows, 1, 0, WARMUP_TOKENS)
    rows.rewind(0, 0)
    by_depth: dict[int, dict[int, float]] = {}
    for depth in sorted(asked.depths):
        fill(rows, max(asked.rows), held, depth)
        by_depth[depth], held = {count: step_ms(rows, count, depth, asked.steps) for count in asked.rows}, depth
    return {"ms": by_depth, "prefill_tok_s": prefill_tok_s(rows, deepest)}


def run_busy(asked: argparse.Namespace) -> dict[str, object]:
    """Milliseconds a step by the number of other busy processes and by rows."""
    (depth,) = asked.depths
    rows = open_rows(asked, max(asked.rows), depth + asked.steps + WARMUP_TOKENS)
    fill(rows, max(asked.rows), 0, depth)
    by_others: dict[int, dict[int, float]] = {}
    for others in asked.others:
        with busy_processes(others):
            by_others[others] = {count: step_ms(rows, count, depth, asked.steps) for count in asked.rows}
    return {"ms": by_others}


def run_logits(asked: argparse.Namespace) -> dict[str, object]:
    """Write the logits of all places of some texts, one behind the other. Shapes: float32 (texts, T, V)."""
    import numpy as np

    texts = json.loads(asked.texts.read_text())
    rows = open_rows(asked, 1, max(map(len, texts)))
    np.save(asked.out, np.stack([rows.all_logits(ids) for ids in texts]))
    return {"texts": len(texts)}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    words = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


JOBS = {"depth": run_depth, "busy": run_busy, "logits": run_logits}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=tuple(JOBS))
    parser.add_argument("--engine", choices=("onnx", "llama.cpp"), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--depths", type=int, nargs="+", default=[128])
    parser.add_argument("--others", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    print(json.dumps(JOBS[asked.job](asked)), flush=True)


if __name__ == "__main__":
    main()
