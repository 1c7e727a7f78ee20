"""From measurements of pictures to figures, goals and the written report. Arithmetic and text: nothing runs here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Literal

import numpy as np

from tests.bench.image_contestants import (
    BARE,
    BARE_SINGLE,
    IMAGE_CONTESTANTS,
    MFLUX_BLAS,
    MFLUX_PLAIN,
    RUNNER,
    TORCH,
    TORCH_SINGLE,
    ImageContestant,
)
from tests.bench.image_measurement import Floats, ImageMeasurement
from tests.bench.report import MIB, Spread, table

ImageMetric = Literal["step", "decode", "encode", "peak", "load"]
IMAGE_METRICS: Mapping[ImageMetric, Callable[[ImageMeasurement], float | None]] = {
    "step": lambda run: median(run.step_s),
    "decode": lambda run: run.decode_s,
    "encode": lambda run: run.encode_s,
    "peak": lambda run: run.peak_rss_bytes and run.peak_rss_bytes / MIB,
    "load": lambda run: run.load_s,
}
IMAGE_TITLES: Mapping[ImageMetric, str] = {
    "step": "a step, s",
    "decode": "VAE decode, s",
    "encode": "VAE encode, s",
    "peak": "peak RSS, MiB",
    "load": "load to ready, s",
}
OUTPUTS: Mapping[str, tuple[float, str]] = {
    "velocity": (1.0, "one forward pass, of standard deviation 1"),
    "picture": (255.0, "the picture, in 1/255"),
    "encoded": (1.0, "latents of a picture"),
}
"""By name in a contestant's file: in which unit differences are told, and what it is."""


@dataclass(frozen=True, slots=True)
class ImageGoal:
    """One contestant's figure over another's. Without a limit the ratio is only told."""

    metric: ImageMetric
    over: str
    under: str
    most: float | None = None
    aim: float | None = None
    """Below `most`: what is wished."""
    least: float | None = None


IMAGE_GOALS = (
    ImageGoal("step", MFLUX_BLAS, RUNNER, least=1.0),
    ImageGoal("step", MFLUX_PLAIN, RUNNER, least=20.0),
    ImageGoal("step", RUNNER, TORCH, most=1.4, aim=1.1),
    ImageGoal("decode", RUNNER, TORCH, most=1.4, aim=1.1),
    ImageGoal("peak", RUNNER, TORCH, most=1.0),
    ImageGoal("decode", MFLUX_BLAS, RUNNER),
    ImageGoal("peak", RUNNER, MFLUX_BLAS),
    ImageGoal("step", RUNNER, BARE),
    ImageGoal("decode", RUNNER, BARE),
    ImageGoal("encode", BARE, TORCH),
    ImageGoal("step", BARE_SINGLE, TORCH_SINGLE),
    ImageGoal("load", RUNNER, TORCH),
)


@dataclass(slots=True)
class ImageOutcome:
    """What a contestant did in all rounds."""

    contestant: ImageContestant
    runs: dict[int, ImageMeasurement] = field(default_factory=dict)
    """By round."""
    outputs: Mapping[str, Floats] = field(default_factory=dict)
    """Of its last run, by the names of `OUTPUTS`."""
    failures: list[str] = field(default_factory=list)

    def values(self, metric: ImageMetric) -> dict[int, float]:
        """The figure of each round that has it."""
        figures = {turn: IMAGE_METRICS[metric](run) for turn, run in self.runs.items()}
        return {turn: value for turn, value in figures.items() if value is not None}

    def spread(self, metric: ImageMetric) -> Spread | None:
        """None if it was never measured."""
        values = list(self.values(metric).values())
        return Spread.of(values) if values else None


@dataclass(frozen=True, slots=True)
class ImageVerdict:
    """A goal with what was measured."""

    goal: ImageGoal
    ratio: Spread | None
    """Of the rounds in which both ran, each round's ratio: noise that lasts minutes falls on both."""

    @property
    def word(self) -> str:
        goal, ratio = self.goal, self.ratio
        if ratio is None:
            return "not measured"
        if goal.most is None and goal.least is None:
            return "for comparison"
        if (goal.most is not None and ratio.median > goal.most) or (
            goal.least is not None and ratio.median < goal.least
        ):
            return "**not met**"
        if goal.aim is None:
            return "met"
        return "met, the aim too" if ratio.median <= goal.aim else "met, not the aim"

    @property
    def limit(self) -> str:
        goal = self.goal
        if goal.most is not None:
            return f"<= {goal.most:g}" + ("" if goal.aim is None else f" (aim {goal.aim:g})")
        return "" if goal.least is None else f">= {goal.least:g}"


def judge(goal: ImageGoal, outcomes: Mapping[str, ImageOutcome]) -> ImageVerdict:
    """Compare two contestants round by round."""
    one, other = (outcomes[name].values(goal.metric) if name in outcomes else {} for name in (goal.over, goal.under))
    ratios = [one[turn] / other[turn] for turn in sorted(one.keys() & other.keys())]
    return ImageVerdict(goal, Spread.of(ratios) if ratios else None)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a contestant's output is from diffusers', on the same inputs."""

    contestant: str
    output: str
    most: float
    mean: float


def agreements(outcomes: Mapping[str, ImageOutcome]) -> list[Agreement]:
    """Of everyone with diffusers, for each output that both have."""
    reference = outcomes.get(TORCH)
    if reference is None:
        return []
    found = []
    for name, outcome in outcomes.items():
        for output, (unit, _) in OUTPUTS.items():
            if outcome is reference or output not in outcome.outputs or output not in reference.outputs:
                continue
            apart = unit * np.abs(outcome.outputs[output].astype(np.float64) - reference.outputs[output])
            found.append(Agreement(name, output, float(apart.max()), float(apart.mean())))
    return found


def to_json(outcomes: Mapping[str, ImageOutcome], facts: Mapping[str, object]) -> dict[str, object]:
    """Everything, for machines: each run with its figures, each goal with its ratio."""
    return {
        "facts": dict(facts),
        "contestants": [
            {
                **asdict(outcome.contestant),
                "failures": outcome.failures,
                "runs": [
                    {**asdict(run), "round": turn, **{name: value(run) for name, value in IMAGE_METRICS.items()}}
                    for turn, run in sorted(outcome.runs.items())
                ],
            }
            for outcome in outcomes.values()
        ],
        "goals": [
            {
                **asdict(verdict.goal),
                "ratio": verdict.ratio and asdict(verdict.ratio),
                "verdict": verdict.word.strip("*"),
            }
            for verdict in (judge(goal, outcomes) for goal in IMAGE_GOALS)
        ],
        "agreements": [asdict(agreement) for agreement in agreements(outcomes)],
    }


def to_markdown(outcomes: Mapping[str, ImageOutcome], facts: Mapping[str, object], further: Sequence[str] = ()) -> str:
    """Everything, for people; `further` are lines of sections that follow the goals."""
    lines = ["# Side by side: a Z-Image of 218M parameters, 256x256, float32, on this CPU", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "Medians, and least to most, over the rounds. Shorter and smaller is better.", ""]
    lines += table(
        ["", *IMAGE_TITLES.values()],
        [
            [outcome.contestant.label, *(_cell(outcome, metric) for metric in IMAGE_METRICS)]
            for outcome in outcomes.values()
        ],
    )
    lines.append("")
    lines += [
        f"- **{outcome.contestant.label}** failed: {why}" for outcome in outcomes.values() for why in outcome.failures
    ]
    lines += ["", "## Goals", "", "The median, and least to most, of the rounds' ratios.", ""]
    lines += table(
        ["figure", "of", "over that of", "ratio", "goal", ""],
        [_verdict_row(judge(goal, outcomes)) for goal in IMAGE_GOALS],
    )
    lines += ["", "## The same answer?", "", "Differences from diffusers, on the same weights, latents and prompt.", ""]
    rows = [
        [label_of(each.contestant), OUTPUTS[each.output][1], f"{each.most:.2g}", f"{each.mean:.2g}"]
        for each in agreements(outcomes)
    ]
    lines += table(["", "output", "largest", "mean"], rows) if rows else ["- nothing to compare"]
    lines += ["", *further, "## Versions", ""]
    versions: dict[str, str] = {}
    for outcome in outcomes.values():
        for run in outcome.runs.values():
            versions |= run.versions
    lines += [f"- {name} {version}" for name, version in sorted(versions.items())]
    return "\n".join([*lines, ""])


def label_of(name: str) -> str:
    return next(contestant.label for contestant in IMAGE_CONTESTANTS if contestant.name == name)


def _cell(outcome: ImageOutcome, metric: ImageMetric) -> str:
    spread = outcome.spread(metric)
    if spread is not None:
        return spread.text() if len(outcome.values(metric)) > 1 else spread.text().partition(" ")[0]
    return "" if outcome.runs else "missing"


def _verdict_row(verdict: ImageVerdict) -> list[str]:
    goal = verdict.goal
    return [
        IMAGE_TITLES[goal.metric].split(",")[0],
        label_of(goal.over),
        label_of(goal.under),
        "" if verdict.ratio is None else verdict.ratio.text(),
        verdict.limit,
        verdict.word,
    ]
