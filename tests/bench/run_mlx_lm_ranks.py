"""Contestant: one rank of mlx_lm's own sharded generation; the first one says the times between tokens, in ms."""

import argparse
import json
import statistics
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model, sharded_load

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=json.loads, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    asked = parser.parse_args()
    rank = 0
    if asked.ranks > 1:
        group = mx.distributed.init(strict=True, backend="ring")
        rank = group.rank()
        model, _ = sharded_load(asked.model, tensor_group=group)
    else:
        model, _ = load_model(Path(asked.model))
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    times, last = [], time.perf_counter()
    for _ in generate_step(mx.array(asked.prompt), model, max_tokens=asked.steps):
        now = time.perf_counter()
        times.append((now - last) * 1000)
        last = now
    if rank == 0:
        print(json.dumps({"ms": statistics.median(times[2:]), "held": held}))
