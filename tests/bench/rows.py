"""Rows that are decoded side by side, whoever computes them, and what is timed of them.

Runs in the interpreters of all contestants: the standard library only.
"""

import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Protocol

UNTIMED_STEPS = 2
"""Of every series: what is bound and allocated at first use is not what is measured."""
FIRST_ID, LAST_ID = 100, 40_000


class Rows(Protocol):
    """A loaded model with a state for each row."""

    def prefill(self, row: int, begin: int, ids: Sequence[int]) -> int:
        """Run a prompt's tokens from position `begin` on; the most probable next token."""
        ...

    def step(self, places: Sequence[tuple[int, int, int]]) -> list[int]:
        """Run one token of each row, (row, its position, token); the most probable next token of each."""
        ...

    def rewind(self, row: int, begin: int) -> None:
        """Forget what the row holds from `begin` on."""
        ...


def random_ids(seed: int, count: int) -> list[int]:
    """Ordinary tokens of the default model's vocabulary."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST_ID, LAST_ID) for _ in range(count)]


def step_ms(rows: Rows, count: int, begin: int, steps: int) -> float:
    """The median milliseconds of a greedy step of `count` rows that hold `begin` tokens, which they hold afterwards."""
    tokens, taken = random_ids(begin, count), []
    for position in range(begin, begin + UNTIMED_STEPS + steps):
        started = time.perf_counter()
        tokens = rows.step([(row, position, token) for row, token in enumerate(tokens)])
        taken.append(time.perf_counter() - started)
    for row in range(count):
        rows.rewind(row, begin)
    return 1000 * median(taken[UNTIMED_STEPS:])


def fill(rows: Rows, count: int, begin: int, end: int) -> None:
    """Prefill rows that hold `begin` tokens so that they hold `end`."""
    for row in range(count):
        rows.prefill(row, begin, random_ids(row, end)[begin:])


def prefill_tok_s(rows: Rows, length: int) -> float:
    """Tokens a second of a prompt in the first row, which is empty afterwards."""
    rows.rewind(0, 0)
    started = time.perf_counter()
    rows.prefill(0, 0, random_ids(0, length))
    taken = time.perf_counter() - started
    rows.rewind(0, 0)
    return length / taken
