"""One model on 1, 2 and 4 ranks of this machine: what they say to each other, a step's time, and memory a rank.

Beside mlx_lm's own sharded generation, from the same checkpoint and with as many ranks, in turns. Ranks on one machine
share its cores, so the times tell what sharing costs here and not what machines of their own gain.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from models.checkpoint import open_checkpoint
from models.executors.base import Executor, Row, Step
from models.executors.mlx import load as load_alone
from models.executors.mlx.ranks import RankExecutor, rank_footprint
from models.weights.matching import model_of, tensors_of
from models.weights.shares import plans_of
from runner.folders import cache_folder
from runner.parent import free_port
from tests.bench.commands import REPOSITORY, once, python_in, run
from tests.bench.figures import Goal, run_module, say, show
from tests.bench.large_checkpoint import Shape, write
from tests.bench.preparation import MLX, MLX_LM
from tests.parity_ranks.world import load, start

SHAPE = Shape(hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=8, head=64, vocabulary=32_000)
NAME = "distributed-4bit"
RANKS = (1, 2, 4)
PROMPT_TOKENS, STEPS = 32, 24
WIDTH_BYTES = 4
"""Of a value that is summed, on a CPU."""


def write_float32(folder: Path) -> None:
    """The scales and all else in float32, which is what everyone computes in on a CPU without being slow."""
    write(folder, SHAPE)
    for file in folder.glob("*.safetensors"):
        arrays = load_file(file)
        wide = {name: each if each.dtype == np.uint32 else each.astype(np.float32) for name, each in arrays.items()}
        save_file(wide, file)


def prompt() -> list[int]:
    """The same tokens to all."""
    draw = random.Random(0)
    return [draw.randrange(SHAPE.vocabulary) for _ in range(PROMPT_TOKENS)]


def measure(folder: Path, count: int, sharding: str) -> dict[str, Any]:
    """Decode as the first of so many ranks."""
    checkpoint = open_checkpoint(str(folder), folder)
    model = model_of(checkpoint)
    if count == 1:
        executor: Executor = load_alone(checkpoint, model, longest_step=64)
        ms = decode(executor)
        return {"ms": ms, "held": executor.memory_bytes(), "collectives": 0, "bytes": 0, "predicted": 0}
    ranks = start(count)
    shared = load(folder, ranks, sharding, 0, "keep")
    own = shared._own
    assert isinstance(own, RankExecutor)
    found = tensors_of(model, checkpoint)
    plans = plans_of(model, found, folder.name, count, sharding)
    predicted = max(rank_footprint(model, plan, found, "keep", "f16").weights for plan in plans)
    held = own.weights.nbytes
    ms = decode(shared)
    before = own.talk.count, own.talk.nbytes
    shared.forward(Step((Row(0, PROMPT_TOKENS + STEPS, (1,)),)))
    said = own.talk.count - before[0], own.talk.nbytes - before[1]
    shared.close()
    ranks.stop()
    return {"ms": ms, "held": held, "collectives": said[0], "bytes": said[1], "predicted": predicted}


def decode(executor: Executor) -> float:
    """The median of a step's time in ms, each on the likeliest token."""
    tokens = tuple(prompt())
    times, begin = [], 0
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        logits = executor.forward(Step((Row(0, begin, tokens),)))
        assert logits is not None
        begin += len(tokens)
        tokens = (int(logits.read()[-1].argmax()),)
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times[2:])


def rival(python: Path, folder: Path, count: int) -> dict[str, Any]:
    """What mlx_lm says. Raises LookupError: it failed."""
    words = [str(python), "-m", "tests.bench.run_mlx_lm_ranks", f"--model={folder}", f"--prompt={prompt()}"]
    words += [f"--steps={STEPS}", f"--ranks={count}"]
    hosts = folder.with_name(f"{NAME}-hosts.json")
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(count)]))
    ranks = [
        subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    said = [each.communicate() for each in ranks]
    if ranks[0].returncode:
        raise LookupError(said[0][1].decode().splitlines()[-1])
    return json.loads(said[0][0].splitlines()[-1])


def rival_python(place: Path) -> Path:
    """An interpreter that has mlx_lm, made once."""
    python = python_in(place / "venv-mlx-lm")
    if not python.exists():
        say(f"installing {MLX_LM} (once)")
        run([sys.executable, "-m", "venv", str(place / "venv-mlx-lm")])
        run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", MLX_LM, MLX])
    return python


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.distributed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rival", type=Path, help="an interpreter that has mlx_lm")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure is not None:
        folder, count, sharding = asked.measure
        print(json.dumps(measure(Path(folder), int(count), sharding)))
        return
    place = cache_folder(os.environ) / "bench"
    place.mkdir(parents=True, exist_ok=True)
    folder = place / NAME
    once(folder, say, "writing the model (once)", write_float32)
    python = asked.rival or rival_python(place)
    ours: dict[int, list[dict[str, Any]]] = {count: [] for count in RANKS}
    theirs: dict[int, list[dict[str, Any]]] = {count: [] for count in RANKS}
    layers = {}
    for _ in range(asked.rounds):
        for count in RANKS:
            ours[count].append(_said(folder, count, "tensor"))
            theirs[count].append(rival(python, folder, count))
    for count in RANKS[1:]:
        layers[count] = _said(folder, count, "pipeline")
    _show(ours, theirs, layers)


def _said(folder: Path, count: int, sharding: str) -> Any:
    return run_module(["tests.bench.distributed", "--measure", str(folder), str(count), sharding])


def _show(ours: Any, theirs: Any, layers: Any) -> None:
    least = 2 * SHAPE.layers * SHAPE.hidden * WIDTH_BYTES
    cells, goals = [], []
    for count in RANKS:
        one, other = ours[count][0], theirs[count][0]
        ms, their_ms = ([each["ms"] for each in of[count]] for of in (ours, theirs))
        cells.append(
            [
                str(count),
                f"{statistics.median(ms):.1f}",
                f"{statistics.median(their_ms):.1f}",
                str(one["collectives"]),
                f"{one['bytes'] / 1024:.0f}",
                f"{least / 1024:.0f}" if count > 1 else "0",
                f"{one['held'] / 2**20:.1f}",
                f"{one['predicted'] / 2**20:.1f}" if count > 1 else "",
                f"{other['held'] / 2**20:.1f}",
                f"{layers[count]['ms']:.1f}" if count in layers else "",
            ]
        )
        ratios = [mine / their for mine, their in zip(ms, their_ms, strict=True)]
        # Alone there is nothing shared: it is told as the measure of the others.
        goals.append(Goal(f"{count} ranks: a step over mlx_lm's", ratios, 1.0 if count > 1 else None, "<="))
    for count in RANKS[1:]:
        each = ours[count][0]
        goals.append(Goal(f"{count} ranks: collectives a layer", [each["collectives"] / SHAPE.layers], 2.5, "<="))
        goals.append(Goal(f"{count} ranks: held over a share", [each["held"] * count / ours[1][0]["held"]], 1.1, "<="))
    head = ["ranks", "a step, ms", "mlx_lm, ms", "collectives a token", "KiB a token", "least KiB", "held a rank, MiB"]
    show(
        f"Distributed: {SHAPE.layers} layers of {SHAPE.hidden}, 4 bits, loopback",
        [*head, "predicted", "mlx_lm's", "by layers, ms"],
        cells,
        goals,
        ours={str(count): said for count, said in ours.items()},
        theirs={str(count): said for count, said in theirs.items()},
        by_layers={str(count): said for count, said in layers.items()},
    )


if __name__ == "__main__":
    main()
