"""Draws bench.json: `python -m tests.bench.plot JSON PNG`, in the bench's own environment."""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

PANELS = (
    ("decode", "decode, tok/s (longer is better)"),
    ("prefill", "prefill, tok/s (longer is better)"),
    ("load", "load to ready, s (shorter is better)"),
    ("memory", "peak RSS, MiB (shorter is better)"),
)
OURS, OTHERS = "#0b6e4f", "#8a94a6"


def draw(report: dict[str, Any], target: Path) -> None:
    shown = report["contestants"]
    labels = [contestant["label"] for contestant in shown]
    colors = [OURS if contestant["name"].startswith(("runner", "bare")) else OTHERS for contestant in shown]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.2), sharey=True, layout="constrained")
    for (metric, title), axis in zip(PANELS, axes.flat, strict=True):
        values = [[run[metric] for run in contestant["runs"]] or [0.0] for contestant in shown]
        middles = [median(value) for value in values]
        spans = [
            [middle - min(value) for middle, value in zip(middles, values, strict=True)],
            [max(value) - middle for middle, value in zip(middles, values, strict=True)],
        ]
        axis.barh(labels, middles, xerr=spans, color=colors, error_kw={"ecolor": "#222", "capsize": 3, "lw": 1})
        for row, (middle, value) in enumerate(zip(middles, values, strict=True)):
            number = f"{middle:.0f}" if middle >= 100 else f"{middle:.1f}" if middle else "missing"
            axis.text(max(value), row, f"  {number}", va="center", fontsize=11)
        axis.set_xlabel(title, fontsize=11)
        axis.set_xlim(0, 1.2 * max(*(max(value) for value in values), 1e-9))
        axis.tick_params(labelsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    facts = report["facts"]
    figure.suptitle(
        f"SmolLM2-135M-Instruct, {facts['threads']} threads, rounds: {facts['rounds']} (median, least to most)\n"
        f"{facts['CPU']}",
        fontsize=12,
    )
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args()
    draw(json.loads(asked.report.read_text()), asked.target)
