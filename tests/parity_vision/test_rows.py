"""The equalities of rows with pictures, on every executor, against what transformers says of tiny models.

The pictures' rows are the reference's here, so that nothing but the decoder is looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from models.executors.base import Executor
from tests.parity_vision.rows import (
    EXECUTORS,
    FOLDERS,
    Planned,
    Prompt,
    Sight,
    load,
    planned,
    read_prompts,
    run,
    run_in_pieces,
    sight_of,
)

TOLERANCE = 2e-4
ONE, TWO, FIRST, NONE = range(4)
"""The prompts: with a picture, with two, with one in front, with none."""


@dataclass(frozen=True, slots=True)
class Fixture:
    executor: Executor
    sight: Sight
    prompts: list[Prompt]
    plans: list[Planned]


@pytest.fixture(scope="module", params=list(product(FOLDERS, EXECUTORS)), ids="-".join)
def loaded(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    name, kind = request.param
    executor, sight, prompts = load(name, kind), sight_of(name), read_prompts(name)
    yield Fixture(executor, sight, prompts, [planned(sight, prompt.text) for prompt in prompts])
    executor.close()


@pytest.fixture
def fixture(loaded: Fixture) -> Iterator[Fixture]:
    yield loaded
    for slot in range(8):
        loaded.executor.release(slot)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_the_logits_are_the_references_at_every_position(fixture: Fixture):
    for slot, (prompt, plan) in enumerate(zip(fixture.prompts, fixture.plans, strict=True)):
        (logits,) = run(fixture.executor, plan.row(slot, 0, plan.tokens))
        assert_close(logits, prompt.logits)


@pytest.mark.parametrize("size", [5, 16])
def test_a_prompt_in_chunks_is_the_prompt_in_one(fixture: Fixture, size: int):
    for prompt, plan in zip(fixture.prompts, fixture.plans, strict=True):
        assert_close(run_in_pieces(fixture.executor, 0, plan, plan.tokens, *plan.cuts(size)), prompt.logits)
        fixture.executor.release(0)


def test_a_row_computes_the_same_in_any_company(fixture: Fixture):
    """A row with pictures is read in chunks beside one that decodes and one that has another picture's."""
    executor, own, other = fixture.executor, fixture.plans[TWO], fixture.plans[FIRST]
    decoding = fixture.prompts[NONE]
    plain = fixture.plans[NONE]
    tokens = plain.tokens + decoding.continuation
    run(executor, plain.row(4, 0, plain.tokens))
    parts: list[np.ndarray] = []
    begin = 0
    for number, end in enumerate([*own.cuts(7), len(own.tokens)]):
        rows = [own.row(2, begin, own.tokens[begin:end])]
        place = len(plain.tokens) + number
        if place < len(tokens):
            rows.insert(0, plain.row(4, place, tokens[place : place + 1]))
        if number == 1:
            rows.append(other.row(6, 0, other.tokens))
        parts.append(run(executor, *rows)[int(place < len(tokens))])
        begin = end
    assert_close(np.concatenate(parts), fixture.prompts[TWO].logits)


def test_greedy_rows_together_continue_as_the_reference_does(fixture: Fixture):
    plans = fixture.plans
    chunks, done = [plan.tokens for plan in plans], [0 for _ in plans]
    generated: list[list[int]] = [[] for _ in plans]
    for _ in fixture.prompts[0].continuation:
        rows = [plans[slot].row(slot, done[slot], chunk) for slot, chunk in enumerate(chunks)]
        done = [begin + len(chunk) for begin, chunk in zip(done, chunks, strict=True)]
        chunks = [[int(logits[-1].argmax())] for logits in run(fixture.executor, *rows)]
        for tokens, chunk in zip(generated, chunks, strict=True):
            tokens.extend(chunk)
    assert generated == [prompt.continuation for prompt in fixture.prompts]


def test_drafts_behind_a_picture_are_taken_back(fixture: Fixture):
    executor, plan, prompt = fixture.executor, fixture.plans[FIRST], fixture.prompts[FIRST]
    tokens, length = plan.tokens + prompt.continuation, len(plan.tokens)
    whole = run_in_pieces(executor, 1, plan, tokens, length)[length:]
    run(executor, plan.row(0, 0, plan.tokens))
    said = []
    for begin in range(length, len(tokens), 3):
        right = tokens[begin : begin + 3]
        (logits,) = run(executor, plan.row(0, begin, [*right, *tokens[: begin % 4]]))
        said.append(logits[: len(right)])
    assert_close(np.concatenate(said), whole)


def test_a_restored_row_is_like_fresh(fixture: Fixture):
    executor, plan, prompt = fixture.executor, fixture.plans[TWO], fixture.prompts[TWO]
    tokens, behind = plan.tokens + prompt.continuation, plan.placed[-1].end
    fresh = run_in_pieces(executor, 0, plan, tokens, behind)[behind:]
    run(executor, plan.row(1, 0, tokens[:behind]))
    checkpoint = executor.checkpoint(1, behind) if executor.needs_checkpoints else None
    kept = executor.segment(1, behind, 0, behind)
    executor.release(1)
    executor.restore(3, [kept], checkpoint)
    assert_close(run_in_pieces(executor, 3, plan, tokens, behind + 2, begin=behind), fresh)


@pytest.mark.parametrize("name", FOLDERS)
def test_on_a_cpu_the_bits_of_a_row_with_pictures_do_not_depend_on_its_company(name: str):
    executor, sight, prompts = load(name, "onnx"), sight_of(name), read_prompts(name)
    own, other = planned(sight, prompts[TWO].text), planned(sight, prompts[ONE].text)
    tokens = own.tokens + prompts[TWO].continuation
    places = range(len(own.tokens), len(tokens))
    alone = run_in_pieces(executor, 0, own, tokens, *places)
    beside = run(executor, own.row(3, 0, own.tokens), other.row(1, 0, other.tokens))[:1]
    for number, place in enumerate(places):
        neighbour = other.row(1, len(other.tokens) + number, [5 + number])
        beside.append(run(executor, neighbour, own.row(3, place, tokens[place : place + 1]))[1])
    executor.close()
    np.testing.assert_array_equal(np.concatenate(beside), alone)
