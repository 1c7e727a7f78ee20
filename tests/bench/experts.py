"""Mixtures of experts with random weights: load, memory, and a token's cost beside what its picked weights take."""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.device import usable_cores
from models.executors.onnx.filling import held_sizes
from models.executors.onnx.loading import record
from models.weights.matching import tensors_of
from runner.folders import cache_folder
from tests.bench.commands import once
from tests.bench.experts_checkpoint import SHAPES, Mixture, write
from tests.bench.figures import Goal, run_module, say, show
from tests.bench.measurement import peak_rss_bytes
from tests.bench.rows import prefill_tok_s, random_ids, step_ms

CONTEXT, PROMPT_TOKENS, STEPS, ROWS = 2048, 64, 24, (1, 4)
LEAST_OF_LIMIT, MOST_OF_FILE = 0.6, 2.1


def measure(folder: Path, shape: Mixture, threads: int) -> None:
    """Load and decode in this process; one line of JSON."""
    from tests.bench.bare import BareRows, options

    begin = time.monotonic()
    rows = BareRows.open(folder, float32=False, rows=max(ROWS), row_tokens=CONTEXT, threads=threads)
    said: dict[str, object] = {"load_s": time.monotonic() - begin, "held": rows.weight_bytes, "peak": peak_rss_bytes()}
    checkpoint = open_checkpoint(str(folder), Path())
    model = build_model(checkpoint.config)
    held = options(float32=False, rows=1, row_tokens=CONTEXT, threads=threads)
    sizes = dict(held_sizes(record(model, tensors_of(model, checkpoint), held)))
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    said |= {"experts": experts, "read": sum(sizes.values()) - experts + experts * shape.picked // shape.experts}
    said["prefill"] = prefill_tok_s(rows, 256)
    for row in range(max(ROWS)):
        rows.prefill(row, 0, random_ids(row, PROMPT_TOKENS))
    said["ms"] = {count: step_ms(rows, count, PROMPT_TOKENS, STEPS) for count in ROWS}
    print(json.dumps(said))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.experts", description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--clean", action="store_true", help="remove the checkpoints, and do nothing else")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure is not None:
        measure(Path(asked.measure[0]), next(each for each in SHAPES if each.name == asked.measure[1]), asked.threads)
        return
    folders = {shape: cache_folder(os.environ) / "bench" / f"experts-{shape.name}" for shape in SHAPES}
    if asked.clean:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        return
    cells, goals, raw = [], [], {}
    for shape, folder in folders.items():
        folder.parent.mkdir(parents=True, exist_ok=True)
        once(folder, say, f"writing {shape.name} (once; 2 GB)", lambda target, shape=shape: write(target, shape))
        reading = ["tests.bench.bandwidth", f"--threads={asked.threads}"]
        speeds = [run_module(reading)["bytes_a_second"]]
        said = run_module(["tests.bench.experts", "--measure", str(folder), shape.name, f"--threads={asked.threads}"])
        speeds.append(run_module(reading)["bytes_a_second"])
        file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        possible_ms = 1000 * said["read"] / max(speeds)
        one, four = (said["ms"][str(count)] for count in ROWS)
        cells.append(
            [
                shape.name,
                f"{file_bytes / 2**30:.2f}",
                f"{said['held'] / 2**30:.2f}",
                f"{said['peak'] / 2**30:.2f}",
                f"{said['load_s']:.0f}",
                f"{one:.1f}",
                f"{possible_ms:.1f}",
                f"{four:.1f}",
                f"{said['prefill']:.0f}",
            ]
        )
        goals.append(
            Goal(f"{shape.name}: what the memory's speed allows over a step", [possible_ms / one], LEAST_OF_LIMIT)
        )
        goals.append(Goal(f"{shape.name}: held over the file", [said["held"] / file_bytes], MOST_OF_FILE, "<="))
        raw[shape.name] = said | {"file": file_bytes, "bytes_a_second": speeds}
    head = ["", "file, GiB", "held, GiB", "peak RSS, GiB", "load, s", "1 row, ms", "possible, ms", "4 rows, ms"]
    show("Experts", [*head, "prefill, tok/s"], cells, goals, measured=raw)


if __name__ == "__main__":
    main()
