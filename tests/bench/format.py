"""Structured output: which schemas are accepted, whether answers satisfy them, and what a format costs."""

import argparse
import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.device import usable_cores
from models.grammar import GrammarCompiler
from models.tokenizer import Tokenizer, load_tokenizer
from runner.folders import cache_folder
from tests.bench.figures import Goal, say, show
from tests.bench.format_answers import Told, answers, counted, prompt_of
from tests.bench.format_schemas import Case, Group, compile_all, groups, sampled
from tests.bench.format_steps import ROWS, Engines, costs, mask_seconds, request_of
from tests.bench.preparation import prepare
from tests.bench.servers import LLAMA, RUNNER, SERVERS, start
from tests.bench.serving_preparation import prepare_serving

SCHEMAS, SUITE = "BENCH_JSON_SCHEMAS", "BENCH_JSON_SUITE"
PARTS = ("compile", "steps", "answers", "llama", "suite")
LEAST_ACCEPTED, MOST_SLOWER, MOST_COMPILE_MS = 97.0, 10.0, 50.0
TEMPERATURES = (0.0, 1.0)
CANDIDATES = 48
STATES = ("whole", "in part", "refused")


def tokenizer_of(model: Path) -> tuple[Tokenizer, int]:
    """A model's vocabulary, and how many logits it has."""
    checkpoint = open_checkpoint(str(model), Path())
    return load_tokenizer(checkpoint), build_model(checkpoint.config).config.vocab_size


def at(values: Sequence[float], share: float) -> float:
    """The value that such a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


def spread(values: Sequence[float]) -> str:
    """The median, the value that one of a hundred exceeds, and the greatest."""
    return f"{at(values, 0.5):.1f}, {at(values, 0.99):.1f}, {max(values):.1f}"


def told_of_compiling(cases: Sequence[Case]) -> tuple[list[list[str]], list[Goal]]:
    accepted = [case for case in cases if case.compiled is not None]
    strict = sum(case.is_strict for case in cases)
    milliseconds = [1e3 * case.seconds for case in cases]
    reasons = Counter(case.refusal[:100] for case in cases if case.refusal)
    for reason, count in reasons.most_common():
        say(f"refused {count}: {reason}")
    ignored = Counter(word.partition(" (")[0][:60] for case in accepted for word in case.compiled.ignored)
    for word, count in ignored.most_common():
        say(f"enforced in part {count}: {word}")
    cells = [
        ["schemas", str(len(cases))],
        ["enforced whole, in part, refused", f"{strict}, {len(accepted) - strict}, {len(cases) - len(accepted)}"],
        ["compile ms, p50, p99, most", spread(milliseconds)],
    ]
    goals = [
        Goal("schemas accepted, %", [100 * len(accepted) / len(cases)], LEAST_ACCEPTED),
        Goal("compile p99, ms", [at(milliseconds, 0.99)], MOST_COMPILE_MS, "<="),
    ]
    return cells, goals


def told_of_steps(
    model: Path, cases: Sequence[Case], threads: int, tokens: int, rounds: int
) -> tuple[list[list[str]], list[Goal]]:
    engines = Engines(model, threads)
    candidates = [case for case in cases if case.compiled is not None][:CANDIDATES]
    requests = [request_of(case, prompt_of(case), tokens) for case in candidates]
    texts = engines.answers(requests)
    masks = [1e6 * each for case, text in zip(candidates, texts, strict=True) for each in mask_seconds(case, text)]
    long = [
        request
        for request, text in zip(requests, texts, strict=True)
        if len(engines.tokenizer.encode(text, add_bos=False)) >= tokens - 16
    ]
    found = costs(engines, long, rounds) if long else {}
    cells = [[f"mask us, p50, p99, most, of {len(masks)}", spread(masks)]]
    goals = []
    for rows in ROWS:
        pairs = found.get(rows, [])
        if pairs:
            free, held = (1e3 * median(each) for each in zip(*pairs, strict=True))
            cells.append([f"step ms, {rows} rows, free and held", f"{free:.2f}, {held:.2f}"])
        slower = [100 * (held / free - 1) for free, held in pairs]
        goals.append(Goal(f"a token slower by, {rows} rows, %", slower, MOST_SLOWER, "<="))
    return cells, goals


def told_of_answers(label: str, told: Told) -> tuple[list[str], list[Goal]]:
    finished, valid = counted(told)
    whole, whole_valid = counted(told, lambda answer: answer.case.is_strict)
    refusals = Counter(each.refusal[:90] for each in told.answers if each.refusal)
    for reason, count in refusals.most_common(8):
        say(f"{label}: no answer {count}: {reason}")
    for each in told.finished:
        if problem := each.problem:
            say(f"{label}: {each.case.name} ({'whole' if each.case.is_strict else 'in part'}): {problem}")
    cells = [
        label,
        f"{sum(refusals.values())} of {len(told.answers)}",
        f"{valid} of {finished}",
        f"{whole_valid} of {whole}",
        f"{told.tokens_s:.0f}",
    ]
    goals = [
        Goal(f"{label}: finished answers valid, {what}, %", [100 * good / most] if most else [], 100.0)
        for what, good, most in (("of all schemas", valid, finished), ("of those enforced whole", whole_valid, whole))
    ]
    return cells, goals


async def all_answers(
    asked: argparse.Namespace, cases: Sequence[Case], parts: Sequence[str]
) -> tuple[list[list[str]], list[Goal]]:
    base = prepare(cache_folder(os.environ), (512,), say)
    prepared = prepare_serving(base, (64, 512, 1024, 2000), say)
    accepted = [case for case in cases if case.compiled is not None]
    rows, goals = [], []
    contestants = {each.name: each for each in SERVERS}
    for name, part, temperatures in ((RUNNER, "answers", TEMPERATURES), (LLAMA, "llama", TEMPERATURES[:1])):
        if part not in parts:
            continue
        async with start(contestants[name], prepared, asked.threads) as server:
            for temperature in temperatures:
                label = f"{name}, temperature {temperature:g}"
                row, further = told_of_answers(label, await answers(server, accepted, asked.tokens, temperature))
                rows.append(row)
                goals += further if name == RUNNER else []
                say(f"{label}: {row}")
    return rows, goals


def told_of_suite(found: Sequence[Group]) -> tuple[list[list[str]], list[Goal]]:
    for keyword in sorted({group.keyword for group in found}):
        mine = [group for group in found if group.keyword == keyword]
        say(f"{keyword}: {', '.join(f'{state} {said(mine, state)}' for state in STATES)}")
    wrong = sum(sum(group.invalid) for group in found if group.state == "whole")
    cells = [[f"suite, groups {state}", said(found, state)] for state in STATES]
    return cells, [Goal("invalid instances admitted of groups enforced whole", [float(wrong)], 0.0, "<=")]


def said(found: Sequence[Group], state: str) -> str:
    """How many groups are in a state, and which of their instances are admitted."""
    mine = [group for group in found if group.state == state]
    valid = [each for group in mine for each in group.valid]
    invalid = [each for group in mine for each in group.invalid]
    return f"{len(mine)} (valid {sum(valid)} of {len(valid)}, invalid {sum(invalid)} of {len(invalid)})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.format", description=__doc__)
    parser.add_argument(
        "--schemas", type=Path, default=os.environ.get(SCHEMAS), help=f"JSONSchemaBench's data ({SCHEMAS})"
    )
    parser.add_argument("--suite", type=Path, default=os.environ.get(SUITE), help=f"JSON-Schema-Test-Suite ({SUITE})")
    parser.add_argument("--count", type=int, default=330, help="schemas (default 330, as many of each set)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most (default 128)")
    parser.add_argument("--rounds", type=int, default=3, help="of steps (default 3)")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    asked = parser.parse_args()
    if asked.schemas is None:
        parser.error(f"name a clone's data folder: --schemas or {SCHEMAS}")
    model = prepare(cache_folder(os.environ), (512,), say).gguf
    tokenizer, width = tokenizer_of(model)
    cases = compile_all(GrammarCompiler(tokenizer, width), sampled(Path(asked.schemas), asked.count))
    cells, goals = told_of_compiling(cases)
    if "steps" in asked.only:
        more, further = told_of_steps(model, cases, asked.threads, asked.tokens, asked.rounds)
        cells, goals = cells + more, goals + further
    if "suite" in asked.only and asked.suite is not None:
        more, further = told_of_suite(list(groups(Path(asked.suite), tokenizer, width)))
        cells, goals = cells + more, goals + further
    if {"answers", "llama"} & {*asked.only}:
        answered, further = asyncio.run(all_answers(asked, cases, asked.only))
        for label, refused, valid, whole, rate in answered:
            cells.append(
                [label, f"none from {refused}; valid {valid}, of schemas enforced whole {whole}; {rate} tok/s"]
            )
        goals += further
    show("Structured output", ["", ""], cells, goals)


if __name__ == "__main__":
    main()
