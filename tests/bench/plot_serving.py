"""Draws bench-serve.json: `python -m tests.bench.plot_serving JSON PNG`, in the bench's own environment."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

COLORS = {
    "runner": "#0b6e4f",
    "runner-f32": "#5fae8f",
    "release-0.1.0": "#b9a44c",
    "mlx-lm-blas": "#c8553d",
    "mlx-lm": "#e3a587",
    "llama-f32": "#35588a",
    "llama": "#93aed0",
}
BARE = "#222222"
MIB = 2**20


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def curves(axis: Axes, report: dict[str, Any], figure: Callable[[dict[str, Any]], float | None]) -> None:
    """One line a contestant over the number of streams: medians over the rounds, bars from least to most."""
    for contestant in report["contestants"]:
        points: dict[int, list[float]] = {}
        for turn in report["rounds"]:
            streams = turn["servers"].get(contestant["name"], {}).get("streams", {})
            for count, each in streams.items():
                if (value := figure(each)) is not None:
                    points.setdefault(int(count), []).append(value)
        if not points:
            continue
        counts = sorted(points)
        middles = [median(points[count]) for count in counts]
        low = [middle - min(points[count]) for middle, count in zip(middles, counts, strict=True)]
        high = [max(points[count]) - middle for middle, count in zip(middles, counts, strict=True)]
        color = COLORS[contestant["name"]]
        axis.errorbar(counts, middles, [low, high], marker="o", ms=4, capsize=3, color=color, label=contestant["label"])
    axis.set_xscale("log", base=2)
    ticks = sorted({int(n) for turn in report["rounds"] for run in turn["servers"].values() for n in run["streams"]})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("streams at once")


def bars(axis: Axes, report: dict[str, Any], figures: dict[str, Callable[[dict[str, Any]], float | None]]) -> None:
    """Groups of bars on a logarithmic axis, a group a contestant."""
    shown, rows = [], []
    for contestant in report["contestants"]:
        runs = [
            turn["servers"][contestant["name"]] for turn in report["rounds"] if contestant["name"] in turn["servers"]
        ]
        values = [[value for run in runs if (value := figure(run)) is not None] for figure in figures.values()]
        if all(values):
            shown.append(contestant)
            rows.append([median(value) for value in values])
    height = 0.8 / len(figures)
    for number, title in enumerate(figures):
        places = [row + number * height for row in range(len(shown))]
        values = [row[number] for row in rows]
        colors = [COLORS[contestant["name"]] for contestant in shown]
        axis.barh(places, values, 0.9 * height, color=colors, alpha=1 if number == 0 else 0.55)
        for place, value in zip(places, values, strict=True):
            axis.text(value, place, f" {value:.3g} s {title}", va="center", fontsize=9)
    axis.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(shown))],
        [each["label"].replace(" + ", " +\n").replace(" as it", "\nas it") for each in shown],
    )
    axis.set_xscale("log")
    if rows:
        axis.set_xlim(min(map(min, rows)) / 3, max(map(max, rows)) * 40)
    axis.invert_yaxis()


def memory(axis: Axes, report: dict[str, Any]) -> None:
    for number, turn in enumerate(report["rounds"], 1):
        if turn["memory"]:
            requests, held = zip(*turn["memory"], strict=True)
            axis.plot(requests, [each / MIB for each in held], marker=".", lw=1, label=f"round {number}")
    axis.set_xlabel("short requests after warm-up")
    if axis.lines:
        axis.set_ylim(0, 1.25 * max(held for turn in report["rounds"] for _, held in turn["memory"]) / MIB)
        axis.legend(fontsize=9, loc="lower right")


def draw(report: dict[str, Any], target: Path) -> None:
    figure, axes = pyplot.subplots(2, 3, figsize=(17, 9.5), layout="constrained")
    titles = ("decode, tok/s over all streams", "time to first token p95, s", "decoded tok/s, prefill included")
    curves(axes[0, 0], report, lambda each: each["decode_tok_s"])
    for rows in sorted({rows for turn in report["rounds"] for rows in turn["bare"]}, key=int):
        values = [turn["bare"][rows] for turn in report["rounds"] if rows in turn["bare"]]
        label = "the runner's bare loop" if rows == "1" else None
        axes[0, 0].plot([int(rows)], [median(values)], "x", color=BARE, ms=9, label=label)
    curves(axes[0, 1], report, lambda each: percentile(each["first_token_s"], 0.95))
    axes[0, 1].set_yscale("log")
    curves(axes[0, 2], report, lambda each: each["total_tok_s"])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=9, loc="upper left")
    bars(
        axes[1, 0], report, {"first turn": lambda run: run["first_turn_s"], "second": lambda run: run["second_turn_s"]}
    )
    axes[1, 0].set_title("a conversation: time to first token, s")
    gaps: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "worst": lambda run: max(run["gaps_s"], default=None),
        "p99": lambda run: percentile(run["gaps_s"], 0.99) if run["gaps_s"] else None,
    }
    bars(axes[1, 1], report, gaps)
    axes[1, 1].set_title("gap between tokens while long prompts arrive, s")
    memory(axes[1, 2], report)
    axes[1, 2].set_title("the runner's resident memory, MiB")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    facts = report["facts"]
    figure.suptitle(
        f"SmolLM2-135M-Instruct, {facts['threads']} threads each, prompts + answers of"
        f" {facts['prompt + decoded tokens']} tokens, rounds: {facts['rounds']}\n{facts['CPU']}"
    )
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args()
    draw(json.loads(asked.report.read_text()), asked.target)
