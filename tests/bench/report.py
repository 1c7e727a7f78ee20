"""From measurements to figures, goals and the written report. Arithmetic and text only: nothing runs here."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Literal

from tests.bench.contestants import CONTESTANTS, EXACT_RUNNER, RELEASE, RUNNER, Contestant
from tests.bench.measurement import Measurement

MIB = 2**20
Metric = Literal["decode", "prefill", "load", "first_token", "memory"]
METRICS: Mapping[Metric, Callable[[Measurement], float]] = {
    "decode": lambda run: run.decode_tok_s,
    "prefill": lambda run: run.prefill_tok_s,
    "load": lambda run: run.load_s,
    "first_token": lambda run: run.first_token_s,
    "memory": lambda run: run.peak_rss_bytes / MIB,
}
TITLES: Mapping[Metric, str] = {
    "decode": "decode, tok/s",
    "prefill": "prefill, tok/s",
    "load": "load to ready, s",
    "first_token": "first token, s",
    "memory": "peak RSS, MiB",
}


@dataclass(frozen=True, slots=True)
class Goal:
    """A contestant's figure, or its ratio to another's; without a limit it is only told."""

    metric: Metric
    ours: str
    other: str | None
    limit: float | None = None
    at: Literal[">=", "<="] = ">="
    aim: float | None = None
    """What we should like besides."""

    def word(self, spread: "Spread | None") -> str:
        """What to say of the median."""
        said = verdict(spread and spread.median, self.limit, self.at)
        return f"{said}, and the aim" if said == "met" and self._reaches_aim(spread) else said

    def limit_text(self) -> str:
        """The limit, and the aim behind it."""
        if self.limit is None:
            return ""
        return f"{self.at} {self.limit:g}" + ("" if self.aim is None else f" (aim {self.aim:g})")

    def _reaches_aim(self, spread: "Spread | None") -> bool:
        return self.aim is not None and verdict(spread and spread.median, self.aim, self.at) == "met"


def verdict(value: float | None, limit: float | None, at: str) -> str:
    """What to say of a figure and its limit."""
    if value is None:
        return "not measured"
    if limit is None:
        return "for comparison"
    return "met" if (value >= limit if at == ">=" else value <= limit) else "**not met**"


GOALS = (
    Goal("decode", RUNNER, "llama-cpp", 1.3, aim=1.8),
    Goal("prefill", RUNNER, "llama-cpp", 1.8),
    Goal("prefill", RUNNER, "llama-cpp-f32", 1.0),
    Goal("decode", EXACT_RUNNER, "llama-cpp-f32", 1.0),
    Goal("decode", EXACT_RUNNER, RELEASE, 1.4),
    Goal("decode", RUNNER, "bare", 0.9),
    Goal("memory", RUNNER, None, 400, "<=", aim=300),
    Goal("load", RUNNER, None, 2.5, "<="),
    Goal("decode", EXACT_RUNNER, "bare-f32"),
    Goal("prefill", EXACT_RUNNER, "llama-cpp-f32"),
    Goal("prefill", EXACT_RUNNER, RELEASE),
    Goal("decode", RUNNER, RELEASE),
    Goal("prefill", RUNNER, RELEASE),
    Goal("decode", RUNNER, "mlx-lm-4bit-f32"),
    Goal("prefill", RUNNER, "mlx-lm-4bit-f32"),
    Goal("decode", EXACT_RUNNER, "mlx-lm-blas"),
    Goal("prefill", EXACT_RUNNER, "mlx-lm-blas"),
    Goal("memory", RUNNER, "llama-cpp"),
)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, and between what they lay."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    def text(self) -> str:
        """Three significant digits: `26.4 (25.9 to 26.6)`."""
        return f"{_digits(self.median)} ({_digits(self.least)} to {_digits(self.most)})"


@dataclass(slots=True)
class Outcome:
    """What a contestant did in all rounds."""

    contestant: Contestant
    runs: dict[int, Measurement] = field(default_factory=dict)
    """By round."""
    failures: list[str] = field(default_factory=list)

    def spread(self, metric: Metric) -> Spread | None:
        """None if it never came to an end."""
        return Spread.of([METRICS[metric](run) for run in self.runs.values()]) if self.runs else None

    def add(self, turn: int, run: Measurement) -> None:
        """Take a run in; one that did not compute what was asked is a failure."""
        asked = (self.contestant.prompt_tokens, self.contestant.tokens)
        if (run.prompt_tokens, run.tokens) == asked:
            self.runs[turn] = run
        else:
            self.failures.append(f"{run.prompt_tokens} and {run.tokens} tokens instead of {asked[0]} and {asked[1]}")


def judge(goal: Goal, outcomes: Mapping[str, Outcome]) -> Spread | None:
    """The goal's figure of each round in which everyone it names ran: noise that lasts minutes falls on both."""
    value = METRICS[goal.metric]
    ours = outcomes.get(goal.ours)
    runs = ours.runs if ours else {}
    if goal.other is None:
        values = [value(run) for run in runs.values()]
    else:
        others = outcomes.get(goal.other)
        both = sorted(runs.keys() & others.runs.keys()) if others else []
        values = [value(runs[turn]) / value(others.runs[turn]) for turn in both] if others else []
    return Spread.of(values) if values else None


def same_text(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Lines that say whether those who compute exactly answered as the runner in float32 did."""
    ours = outcomes.get(EXACT_RUNNER)
    if ours is None or not ours.runs:
        return []
    lines = []
    for outcome in outcomes.values():
        contestant = outcome.contestant
        comparable = contestant.exact and contestant.prompt_tokens == ours.contestant.prompt_tokens
        if not comparable or outcome is ours or not outcome.runs:
            continue
        texts = {run.text.strip() for run in (*outcome.runs.values(), *ours.runs.values())}
        lines.append(f"{contestant.label}: {'the same text' if len(texts) == 1 else 'ANOTHER TEXT'}")
    return lines


def to_json(outcomes: Mapping[str, Outcome], facts: Mapping[str, object]) -> dict[str, object]:
    """Everything, for machines: each run with its derived rates, each goal with its ratio."""
    return {
        "facts": dict(facts),
        "contestants": [
            {
                **asdict(outcome.contestant),
                "failures": outcome.failures,
                "runs": [
                    {**asdict(run), "round": turn, **{name: value(run) for name, value in METRICS.items()}}
                    for turn, run in sorted(outcome.runs.items())
                ],
            }
            for outcome in outcomes.values()
        ],
        "goals": [
            {**asdict(goal), "value": spread and asdict(spread), "verdict": goal.word(spread).strip("*")}
            for goal, spread in ((goal, judge(goal, outcomes)) for goal in GOALS)
        ],
    }


def to_markdown(outcomes: Mapping[str, Outcome], facts: Mapping[str, object]) -> str:
    """Everything, for people."""
    lines = ["# Side by side: SmolLM2-135M-Instruct on this CPU", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "Medians, and least to most, over the rounds.", ""]
    lines += table(
        ["", "prompt + decoded", *TITLES.values()],
        [
            [
                outcome.contestant.label,
                f"{outcome.contestant.prompt_tokens} + {outcome.contestant.tokens}",
                *_cells(outcome),
            ]
            for outcome in outcomes.values()
        ],
    )
    lines.append("")
    lines += [
        f"- **{outcome.contestant.label}** failed: {why}" for outcome in outcomes.values() for why in outcome.failures
    ]
    lines += [
        "",
        "## Goals",
        "",
        "A figure, or its ratio to another's: the median, and least to most, over the rounds.",
        "",
    ]
    lines += table(
        ["figure", "of", "over", "", "goal", ""],
        [_goal_row(goal, judge(goal, outcomes)) for goal in GOALS],
    )
    lines += ["", "## The same answer?", ""]
    lines += [f"- {line}" for line in same_text(outcomes)] or ["- nothing to compare"]
    lines += ["", "## Versions", ""]
    versions: dict[str, str] = {}
    for outcome in outcomes.values():
        for run in outcome.runs.values():
            versions |= run.versions
    lines += [f"- {name} {version}" for name, version in sorted(versions.items())]
    return "\n".join([*lines, ""])


def _cells(outcome: Outcome) -> list[str]:
    spreads = [outcome.spread(metric) for metric in METRICS]
    return ["missing" if spread is None else spread.text() for spread in spreads]


def _goal_row(goal: Goal, spread: Spread | None) -> list[str]:
    labels = {contestant.name: contestant.label for contestant in CONTESTANTS}
    return [
        TITLES[goal.metric].split(",")[0] if goal.other else TITLES[goal.metric],
        labels[goal.ours],
        labels[goal.other] if goal.other else "",
        "" if spread is None else spread.text(),
        goal.limit_text(),
        goal.word(spread),
    ]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
