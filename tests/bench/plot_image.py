"""Draws bench-image.json: `python -m tests.bench.plot_image JSON PNG`, in the environment of diffusers."""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

OURS, OTHERS = "#0b6e4f", "#8a94a6"
PANELS = (
    ("step", "seconds a step (shorter is better, logarithmic)"),
    ("decode", "seconds a VAE decode (shorter is better)"),
    ("peak", "peak RSS, MiB (smaller is better)"),
)
KIND_COLORS = (
    "#0b6e4f",
    "#8cc9b0",
    "#f2b84b",
    "#c8553d",
    "#7a5c8e",
    "#4a7fb5",
    "#e08e45",
    "#a3b18a",
    "#d4a5c9",
    "#2f3e46",
)
REST_COLOR = "#d5d9e0"


def bars(axis: Axes, contestants: list[dict[str, Any]], metric: str, title: str) -> None:
    """One bar for each contestant that has the figure; a mark says between what its rounds lay."""
    shown = [each for each in contestants if any(run[metric] is not None for run in each["runs"])]
    values = [[run[metric] for run in each["runs"] if run[metric] is not None] for each in shown]
    middles = [median(value) for value in values]
    spans = [
        [middle - min(value) for middle, value in zip(middles, values, strict=True)],
        [max(value) - middle for middle, value in zip(middles, values, strict=True)],
    ]
    by_side = [OURS if each["name"] in ("runner", "bare", "bare-1") else OTHERS for each in shown]
    labels = [each["label"] for each in shown]
    axis.barh(labels, middles, xerr=spans, color=by_side, error_kw={"ecolor": "#222", "capsize": 3, "lw": 1})
    for row, (middle, value) in enumerate(zip(middles, values, strict=True)):
        number = f"{middle:.0f}" if middle >= 100 else f"{middle:.1f}" if middle >= 10 else f"{middle:.2f}"
        axis.text(max(value), row, f"  {number}", va="center", fontsize=10)
    axis.set_xlabel(title, fontsize=10)
    if metric == "step" and middles:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(min(middles) / 2, 3 * max(middles))
    else:
        axis.set_xlim(0, 1.2 * max([*(max(value) for value in values), 1e-9]))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def kinds_of(profile: dict[str, Any]) -> list[str]:
    """The kinds of work, the one with the largest share first."""
    most: dict[str, float] = {}
    for each in profile.values():
        for kind, seconds in each["kinds_s"].items():
            most[kind] = max(most.get(kind, 0.0), seconds / sum(each["kinds_s"].values()))
    return sorted(most, key=lambda kind: -most[kind])


def colors(count: int) -> list[str]:
    return [*(KIND_COLORS[index % len(KIND_COLORS)] for index in range(count - 1)), REST_COLOR]


def shares(axis: Axes, profile: dict[str, Any]) -> None:
    """Where the time of a step and of a decode goes, one stacked bar each."""
    seconds = {kind: [each["kinds_s"].get(kind, 0.0) for each in profile.values()] for kind in kinds_of(profile)}
    seconds["the rest"] = [each["unnamed_s"] for each in profile.values()]
    totals = [sum(column) for column in zip(*seconds.values(), strict=True)]
    left = [0.0] * len(profile)
    for (kind, values), color in zip(seconds.items(), colors(len(seconds)), strict=True):
        widths = [100 * value / total for value, total in zip(values, totals, strict=True)]
        axis.barh([f"a {part}" for part in profile], widths, left=left, color=color, label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_xlim(0, 100)
    axis.set_xlabel("where the runner's time goes, %", fontsize=10)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def draw(report: dict[str, Any], target: Path) -> None:
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
    for (metric, title), axis in zip(PANELS, axes.flat, strict=False):
        bars(axis, report["contestants"], metric, title)
    profile = report["sections"].get("profile", {"failed": ""})
    if "failed" in profile:
        axes[1, 1].set_axis_off()
    else:
        shares(axes[1, 1], profile)
    facts = report["facts"]
    figure.suptitle(
        f"Z-Image of 218M parameters, 256x256, float32, {facts['threads']} threads, rounds: {facts['rounds']}\n"
        f"{facts['CPU']}",
        fontsize=11,
    )
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args()
    draw(json.loads(asked.report.read_text()), asked.target)
