"""Predicted beside measured bytes: the weights of models, and the keys and values of one long row."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import psutil

from models.arch import build_model
from models.checkpoint import Checkpoint, NamedTensor, TensorInfo, open_checkpoint
from models.device import usable_cores
from models.executors.onnx import footprint
from models.ops import weights_in
from models.process_memory import trim
from models.weights.matching import matched
from runner.default_model import fetch
from runner.folders import cache_folder
from tests.bench.bare import BareRows, options
from tests.bench.figures import Goal, run_module, show
from tests.bench.large import NAME
from tests.bench.rows import random_ids

ROW_TOKENS, ROWS, LARGE_LAYERS = 4096, 3, 2
OFF_BY = 0.05
MIB = 2**20


class FirstLayers:
    """A checkpoint cut off behind some layers (see `Checkpoint`)."""

    def __init__(self, whole: Checkpoint, layers: int) -> None:
        self._whole, self._layers = whole, layers
        self.reference, self.nbytes = whole.reference, whole.nbytes

    @property
    def config(self) -> Mapping[str, object]:
        return {**self._whole.config, "num_hidden_layers": self._layers}

    def read(self, name: str) -> bytes | None:
        return self._whole.read(name)

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        return (info for info in self._whole.infos(component) if self._has(info.name))

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        return (tensor for tensor in self._whole.tensors(component) if self._has(tensor.name))

    def _has(self, name: str) -> bool:
        words = name.split(".")
        return "layers" not in words or int(words[words.index("layers") + 1]) < self._layers


def held_now() -> int:
    trim()
    return psutil.Process().memory_info().rss


def measure(path: Path, layers: int | None, threads: int, *, float32: bool) -> None:
    """Predicted and measured bytes of weights and of a row, in this process; one line of JSON."""
    checkpoint = open_checkpoint(str(path), Path())
    if layers is not None:
        checkpoint = FirstLayers(checkpoint, layers)
    held = options(float32=float32, rows=1 + ROWS, row_tokens=ROW_TOKENS, threads=threads)
    model = build_model(checkpoint.config)
    found = matched(weights_in(model.weights), checkpoint.infos(), checkpoint.reference, model.other_parts)
    predicted = footprint(model, found, held)
    before = held_now()
    rows = BareRows(checkpoint, held)
    weights = held_now() - before
    ids = random_ids(0, ROW_TOKENS)
    grown = []
    for row in range(1 + ROWS):
        before = held_now()
        rows.prefill(row, 0, ids)
        grown.append(held_now() - before)
    # The first row makes the rooms that steps work in, which the others find there.
    row_bytes = int(median(grown[1:]))
    expected = sum(predicted.state(ROW_TOKENS))
    print(json.dumps({"weights": [predicted.weights + predicted.library, weights], "row": [expected, row_bytes]}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory", description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--float32", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure is not None:
        measure(asked.measure, asked.layers, asked.threads, float32=asked.float32)
        return
    cache = cache_folder(os.environ)
    small, large = fetch(cache, lambda _: None), cache / "bench" / NAME
    cases = {"SmolLM2, Q4_1": [f"--measure={small}"], "SmolLM2, float32": [f"--measure={small}", "--float32"]}
    if large.exists():
        title = f"the first {LARGE_LAYERS} layers of `large`, 4 bits"
        cases[title] = [f"--measure={large}", f"--layers={LARGE_LAYERS}"]
    cells, goals, said = [], [], {}
    for title, words in cases.items():
        said[title] = run_module(["tests.bench.memory", *words, f"--threads={asked.threads}"])
        for what in ("weights", "row"):
            predicted, measured = said[title][what]
            cells.append([title, what, f"{predicted / MIB:.1f}", f"{measured / MIB:.1f}"])
            ratio = measured / predicted
            goals.append(Goal(f"{title}: {what}, off by", [max(ratio, 1 / ratio)], 1 + OFF_BY, "<="))
    head = ["", f"a row has {ROW_TOKENS} tokens", "predicted, MiB", "measured, MiB"]
    show("Memory", head, cells, goals, bytes=said)


if __name__ == "__main__":
    main()
