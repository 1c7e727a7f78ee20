"""From the servers' figures to ratios, goals and the written report. Arithmetic and text only: nothing runs here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from tests.bench.load import ServerRun, percentile
from tests.bench.report import MIB, Spread, table, verdict
from tests.bench.servers import (
    BLAS,
    EXACT_RUNNER,
    LLAMA,
    LLAMA_F32,
    RELEASE,
    RUNNER,
    SERVERS,
    ServerContestant,
)


@dataclass(slots=True)
class Round:
    """All that was measured in one round."""

    servers: dict[str, ServerRun] = field(default_factory=dict)
    """By contestant."""
    bare: dict[int, float] = field(default_factory=dict)
    """Decoded tokens a second of the bare loop, by rows."""
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Our runner's resident bytes after so many short requests."""
    failures: dict[str, str] = field(default_factory=dict)


Measure = Callable[[Round], float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure, and what it shall be; without a limit it is only told."""

    title: str
    measure: Measure
    limit: float | None = None
    at: Literal[">=", "<="] = ">="

    def word(self, spread: Spread | None) -> str:
        """What to say of the median."""
        return verdict(spread and spread.median, self.limit, self.at)


def over(one: Measure, other: Measure) -> Measure:
    """The ratio of two figures of the same round."""

    def ratio(turn: Round) -> float | None:
        above, below = one(turn), other(turn)
        return above / below if above is not None and below else None

    return ratio


def decode(name: str, count: int) -> Measure:
    """Tokens a second over all streams."""

    def rate(turn: Round) -> float | None:
        run = turn.servers.get(name)
        streams = run and run.streams.get(count)
        return streams.decode_tok_s if streams else None

    return rate


def bare(rows: int) -> Measure:
    return lambda turn: turn.bare.get(rows)


def of_run(name: str, figure: Callable[[ServerRun], float | None]) -> Measure:
    def measure(turn: Round) -> float | None:
        run = turn.servers.get(name)
        return None if run is None else figure(run)

    return measure


def first_turn(run: ServerRun) -> float | None:
    return run.first_turn_s


def second_turn(run: ServerRun) -> float | None:
    return run.second_turn_s


def worst_gap(run: ServerRun) -> float | None:
    return max(run.gaps_s, default=None)


def p99_gap(run: ServerRun) -> float | None:
    return percentile(run.gaps_s, 0.99) if run.gaps_s else None


def p99_health(run: ServerRun) -> float | None:
    return percentile(run.health_s, 0.99) if run.health_s else None


def p99_health_ms(run: ServerRun) -> float | None:
    seconds = p99_health(run)
    return None if seconds is None else 1000 * seconds


def slope(samples: Sequence[tuple[int, int]]) -> tuple[float, float] | None:
    """A line through the samples by least squares: MiB a request, and the standard error of that."""
    count = len(samples)
    if count < 3:
        return None
    xs, ys = [x for x, _ in samples], [y / MIB for _, y in samples]
    middle_x, middle_y = sum(xs) / count, sum(ys) / count
    spread = sum((x - middle_x) ** 2 for x in xs)
    rise = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / spread
    left = sum((y - middle_y - rise * (x - middle_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return rise, (left / (count - 2) / spread) ** 0.5


def memory_slope_kib(turn: Round) -> float | None:
    fitted = slope(turn.memory)
    return None if fitted is None else 1024 * fitted[0]


def _figure(name: str, count: int, figure: Callable[..., float | None]) -> Measure:
    def measure(turn: Round) -> float | None:
        run = turn.servers.get(name)
        return figure(run.streams[count]) if run is not None and count in run.streams else None

    return measure


def first_token_p95(name: str, count: int) -> Measure:
    """Of prompts that nobody had sent before."""
    return _figure(name, count, lambda streams: percentile(streams.first_token_s, 0.95))


def _goals() -> Iterator[Goal]:
    for count in (2, 4, 8, 16):
        title = f"over llama-server Q4_1, decode, {count} streams"
        yield Goal(title, over(decode(RUNNER, count), decode(LLAMA, count)), 1.6)
    late = over(first_token_p95(RUNNER, 8), first_token_p95(LLAMA, 8))
    yield Goal("over llama-server Q4_1, first token p95, 8 streams", late, 1.0, "<=")
    yield Goal("over the bare loop, decode, 1 stream", over(decode(RUNNER, 1), bare(1)), 0.9)
    yield Goal("over the bare loop, decode, 16 streams", over(decode(RUNNER, 16), bare(16)), 0.9)
    turns = over(of_run(RUNNER, first_turn), of_run(RUNNER, second_turn))
    yield Goal("first turn over second turn, time to first token", turns, 10.0)
    yield Goal("health p99 under full load, ms", of_run(RUNNER, p99_health_ms), 20.0, "<=")
    yield Goal("RSS slope after warm-up, KiB a request", memory_slope_kib, 5.0, "<=")
    yield Goal("over llama-server Q4_1, decode, 1 stream", over(decode(RUNNER, 1), decode(LLAMA, 1)))
    yield Goal("8 streams over 1 stream, decode", over(decode(RUNNER, 8), decode(RUNNER, 1)))
    for other, title in ((LLAMA_F32, "llama-server F32"), (RELEASE, "runner 0.1.0"), (BLAS, "mlx_lm.server + MKL")):
        for count in (1, 8, 16):
            ratio = over(decode(EXACT_RUNNER, count), decode(other, count))
            yield Goal(f"in f32 over {title}, decode, {count} streams", ratio)
    for other, title in ((LLAMA, "llama-server Q4_1"), (RELEASE, "runner 0.1.0"), (BLAS, "mlx_lm.server + MKL")):
        gaps = over(of_run(other, worst_gap), of_run(RUNNER, worst_gap))
        yield Goal(f"worst gap under mixed load: {title} over the runner", gaps)


GOALS = tuple(_goals())


def spread_of(rounds: Sequence[Round], measure: Measure) -> Spread | None:
    """Over the rounds in which there is such a figure."""
    values = [value for turn in rounds if (value := measure(turn)) is not None]
    return Spread.of(values) if values else None


def text_of(rounds: Sequence[Round], measure: Measure) -> str:
    spread = spread_of(rounds, measure)
    return "" if spread is None else spread.text()


def to_json(rounds: Sequence[Round], facts: Mapping[str, object]) -> dict[str, object]:
    """Everything, for machines."""
    return {
        "facts": dict(facts),
        "contestants": [asdict(contestant) for contestant in SERVERS],
        "rounds": [asdict(turn) for turn in rounds],
        "goals": [
            {
                "title": goal.title,
                "limit": goal.limit,
                "at": goal.at,
                "value": spread and asdict(spread),
                "verdict": goal.word(spread).strip("*"),
            }
            for goal in GOALS
            for spread in [spread_of(rounds, goal.measure)]
        ],
    }


def to_markdown(rounds: Sequence[Round], facts: Mapping[str, object]) -> str:
    """Everything, for people."""
    counts = sorted({count for turn in rounds for run in turn.servers.values() for count in run.streams})
    took_part = [each for each in SERVERS if any(each.name in {*turn.servers, *turn.failures} for turn in rounds)]
    lines = ["# Many requests at once: SmolLM2-135M-Instruct on this CPU", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "Medians, and least to most, over the rounds.", "", "## Goals", ""]
    goals = [(goal, spread_of(rounds, goal.measure)) for goal in GOALS]
    lines += table(
        ["runner", "", "goal", ""],
        [
            [
                goal.title,
                "" if spread is None else spread.text(),
                "" if goal.limit is None else f"{goal.at} {goal.limit:g}",
                goal.word(spread),
            ]
            for goal, spread in goals
        ],
    )
    lines += ["", "## Decode, tok/s over all streams, by streams at once", ""]
    lines += _by_count(rounds, took_part, counts, decode)
    bare_rows = sorted({rows for turn in rounds for rows in turn.bare})
    lines += ["", *(f"- bare loop, {rows} rows: {text_of(rounds, bare(rows))}" for rows in bare_rows)]
    for title, figure in COUNT_TABLES:
        lines += ["", f"## {title}, by streams at once", ""]
        lines += _by_count(rounds, took_part, counts, figure)
    lines += ["", "## A conversation, a mixed load, health and memory", ""]
    lines += table(
        ["", *(title for title, _ in RUN_COLUMNS)],
        [
            [each.label, *(text_of(rounds, of_run(each.name, figure)) for _, figure in RUN_COLUMNS)]
            for each in took_part
        ],
    )
    return "\n".join([*lines, *_memory_lines(rounds), *_notes(rounds), *_same_text(rounds), ""])


COUNT_TABLES: tuple[tuple[str, Callable[[str, int], Measure]], ...] = (
    (
        "With prefill: decoded tok/s from the first request to the last token",
        lambda name, count: _figure(name, count, lambda streams: streams.total_tok_s),
    ),
    (
        "Time to first token p50, s",
        lambda name, count: _figure(name, count, lambda streams: percentile(streams.first_token_s, 0.5)),
    ),
    ("Time to first token p95, s", first_token_p95),
    (
        "Time to first token p95 of the same prompts again, s",
        lambda name, count: _figure(name, count, lambda streams: percentile(streams.warm_first_token_s, 0.95)),
    ),
)
RUN_COLUMNS: tuple[tuple[str, Callable[[ServerRun], float | None]], ...] = (
    ("first turn, s to first token", first_turn),
    ("second turn, s", second_turn),
    ("gap p99, s", p99_gap),
    ("gap worst, s", worst_gap),
    ("health p99, ms", p99_health_ms),
    ("RSS at the end, MiB", lambda run: run.rss_bytes / MIB),
)


def _by_count(
    rounds: Sequence[Round],
    took_part: Sequence[ServerContestant],
    counts: Sequence[int],
    figure: Callable[[str, int], Measure],
) -> list[str]:
    rows = [[each.label, *(text_of(rounds, figure(each.name, count)) for count in counts)] for each in took_part]
    return table(["", *map(str, counts)], rows)


def _memory_lines(rounds: Sequence[Round]) -> list[str]:
    lines = []
    for number, turn in enumerate(rounds, 1):
        if (fitted := slope(turn.memory)) is not None:
            rise, error = fitted
            requests, last = turn.memory[-1]
            lines.append(
                f"- round {number}: RSS grew by {rise:.4f} ± {error:.4f} MiB a request over {requests} requests, "
                f"to {last / MIB:.0f} MiB"
            )
    return ["", *lines] if lines else []


def _notes(rounds: Sequence[Round]) -> list[str]:
    labels = {each.name: each.label for each in SERVERS}
    lines = []
    for number, turn in enumerate(rounds, 1):
        said = [*turn.failures.items(), *((name, note) for name, run in turn.servers.items() for note in run.notes)]
        lines += [f"- round {number}: **{labels.get(name, name)}**: {note}" for name, note in said]
    return ["", "## What failed", "", *lines] if lines else []


def _same_text(rounds: Sequence[Round]) -> list[str]:
    """Whether those who compute in float32 answered a single stream as the runner in float32 did."""
    lines = []
    for each in SERVERS:
        pairs = [
            (turn.servers[EXACT_RUNNER].streams[1], turn.servers[each.name].streams[1])
            for turn in rounds
            if each.float32
            and each.name != EXACT_RUNNER
            and all(name in turn.servers and 1 in turn.servers[name].streams for name in (EXACT_RUNNER, each.name))
        ]
        pairs = [(ours, theirs) for ours, theirs in pairs if ours.prompt_tokens == theirs.prompt_tokens]
        if pairs:
            same = all(ours.text.startswith(theirs.text) for ours, theirs in pairs)
            lines.append(f"- {each.label}: {'the same text' if same else 'ANOTHER TEXT'}")
    return ["", "## The same answer to a single stream?", "", *lines] if lines else []
