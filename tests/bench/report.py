"""From measurements to figures, goals and the written report. Arithmetic and text only: nothing runs here."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Literal

from tests.bench.contestants import CONTESTANTS, RUNNER, Contestant
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
    """The runner's figure over another's, at least that much; without `least` the ratio is only told."""

    metric: Metric
    other: str
    least: float | None = None


GOALS = (
    Goal("decode", "bare", 0.95),
    Goal("decode", "mlx-lm", 4.0),
    Goal("prefill", "mlx-lm", 15.0),
    Goal("decode", "mlx-lm-4bit", 20.0),
    Goal("prefill", "mlx-lm-4bit", 20.0),
    Goal("decode", "mlx-lm-4bit-f32"),
    Goal("prefill", "mlx-lm-4bit-f32"),
    Goal("decode", "mlx-lm-blas", 1.3),
    Goal("prefill", "mlx-lm-blas", 1.5),
    Goal("decode", "llama-cpp-f32"),
    Goal("prefill", "llama-cpp-f32"),
    Goal("decode", "llama-cpp"),
    Goal("prefill", "llama-cpp"),
    Goal("load", "mlx-lm-blas"),
    Goal("first_token", "mlx-lm-blas"),
    Goal("memory", "mlx-lm-blas"),
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


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal with what was measured."""

    goal: Goal
    ratio: Spread | None
    """Of the rounds in which both ran, each round's ratio: noise that lasts minutes falls on both."""

    @property
    def word(self) -> str:
        if self.ratio is None:
            return "not measured"
        if self.goal.least is None:
            return "for comparison"
        return "met" if self.ratio.median >= self.goal.least else "**not met**"


def judge(goal: Goal, outcomes: Mapping[str, Outcome]) -> Verdict:
    """Compare the runner with the goal's other contestant, round by round."""
    ours, others = outcomes.get(RUNNER), outcomes.get(goal.other)
    if ours is None or others is None:
        return Verdict(goal, None)
    value = METRICS[goal.metric]
    both = sorted(ours.runs.keys() & others.runs.keys())
    ratios = [value(ours.runs[turn]) / value(others.runs[turn]) for turn in both]
    return Verdict(goal, Spread.of(ratios) if ratios else None)


def same_text(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Lines that say whether those who compute exactly answered as the runner did, as far as both went."""
    ours = outcomes.get(RUNNER)
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
            {
                **asdict(verdict.goal),
                "ratio": verdict.ratio and asdict(verdict.ratio),
                "verdict": verdict.word.strip("*"),
            }
            for verdict in (judge(goal, outcomes) for goal in GOALS)
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
        "The runner's figure over the other's: the median, and least to most, of the rounds' ratios.",
        "",
    ]
    lines += table(
        ["figure", "runner over", "ratio", "goal", ""],
        [_verdict_row(judge(goal, outcomes)) for goal in GOALS],
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


def _verdict_row(verdict: Verdict) -> list[str]:
    goal = verdict.goal
    return [
        TITLES[goal.metric].split(",")[0],
        next(contestant.label for contestant in CONTESTANTS if contestant.name == goal.other),
        "" if verdict.ratio is None else verdict.ratio.text(),
        "" if goal.least is None else f">= {goal.least:g}",
        verdict.word,
    ]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
