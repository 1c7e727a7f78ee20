"""The equalities of every language architecture, on every executor, against what transformers says of tiny models.

README.md in this folder says what each fixture is for. All comparisons are in float32, of whole logits.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.arch import build_model, discover
from models.checkpoint import open_checkpoint
from models.executors.base import Executor
from models.ops import KV
from tests.parity.executors import EXECUTORS, HERE, load, run, run_in_pieces

FOLDERS = sorted(folder.parent.name for folder in HERE.glob("*/reference.safetensors"))
GGUF_TWINS = sorted(file.stem for file in HERE.glob("*.gguf"))
TOLERANCE = 1e-4
WITHOUT_POSITIONS = 1 << 20


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a fixture with the reference's answers to it."""

    tokens: list[int]
    logits: np.ndarray
    continuation: list[int]


@dataclass(frozen=True, slots=True)
class Fixture:
    executor: Executor
    prompts: list[Prompt]

    @property
    def long(self) -> Prompt:
        return self.prompts[0]


def read_prompts(name: str) -> list[Prompt]:
    arrays = load_file(HERE / name / "reference.safetensors")
    return [
        Prompt(arrays[f"prompt.{n}"].tolist(), arrays[f"logits.{n}"], arrays[f"continuation.{n}"].tolist())
        for n in range(len(arrays) // 3)
    ]


@pytest.fixture(scope="module", params=list(product(FOLDERS, EXECUTORS)), ids="-".join)
def loaded(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    name, kind = request.param
    executor = load(HERE / name, kind)
    yield Fixture(executor, read_prompts(name))
    executor.close()


@pytest.fixture
def fixture(loaded: Fixture) -> Iterator[Fixture]:
    yield loaded
    for slot in range(8):
        loaded.executor.release(slot)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_every_architecture_has_a_fixture():
    # Those that see have the same equalities there.
    files = [*HERE.glob("*/config.json"), *HERE.with_name("parity_vision").glob("*/config.json")]
    configs = [json.loads(file.read_text()) for file in files]
    covered = {name for config in configs for name in config["architectures"]}
    declared = {name for each in discover() for name in each.hf if not each.is_encoder}
    assert declared - covered == set()


def test_every_architecture_that_llama_cpp_writes_has_a_gguf_twin():
    files = [*HERE.glob("*.gguf"), *HERE.with_name("parity_embedding").glob("*.gguf")]
    twins = {name for file in files for name in open_checkpoint(str(file), HERE).config["architectures"]}
    lacking = [entry.hf for entry in discover() if entry.gguf and not twins & {layout.hf for layout in entry.gguf}]
    assert lacking == []


def test_every_fixture_has_an_architecture():
    declared = {name for architecture in discover() for name in architecture.hf}
    covered = {json.loads((HERE / name / "config.json").read_text())["architectures"][0] for name in FOLDERS}
    assert covered - declared == set()


def test_the_logits_are_the_references_at_every_position(fixture: Fixture):
    for slot, prompt in enumerate(fixture.prompts):
        (logits,) = run(fixture.executor, (slot, 0, prompt.tokens))
        assert_close(logits, prompt.logits)


@pytest.mark.parametrize("size", [5, 8, 9])
def test_a_prompt_in_chunks_is_the_prompt_in_one(fixture: Fixture, size: int):
    tokens = fixture.long.tokens
    assert_close(run_in_pieces(fixture.executor, 0, tokens, *range(size, len(tokens), size)), fixture.long.logits)


@pytest.mark.parametrize("prefilled", [1, 24])
def test_prefill_then_decode_is_the_whole(fixture: Fixture, prefilled: int):
    prompt = fixture.long
    tokens = prompt.tokens + prompt.continuation
    (whole,) = run(fixture.executor, (0, 0, tokens))
    assert_close(run_in_pieces(fixture.executor, 1, tokens, *range(prefilled, len(tokens))), whole)


def test_a_row_computes_the_same_in_any_company(fixture: Fixture):
    """Three rows that begin in different steps, in chunks of different lengths, one of them decoding all along."""
    rows = [prompt.tokens + prompt.continuation for prompt in fixture.prompts]
    alone = [run(fixture.executor, (7, 0, tokens))[0] for tokens in rows]
    parts: list[list[np.ndarray]] = [[] for _ in rows]
    done = [0 for _ in rows]
    schedule = [(0, 0, 1), (13, 0, 1), (1, 6, 1), (20, 1, 1), (1, 11, 0), (9, 1, 3), (1, 1, 1), (1, 0, 2), (12, 7, 7)]
    for lengths in schedule:
        taking = [n for n, length in enumerate(lengths) if length]
        chunks = [(2 * n, done[n], rows[n][done[n] : done[n] + lengths[n]]) for n in taking]
        for n, logits in zip(taking, run(fixture.executor, *chunks), strict=True):
            parts[n].append(logits)
            done[n] += lengths[n]
    assert done == [len(tokens) for tokens in rows], "the schedule runs every row to its end"
    for expected, pieces in zip(alone, parts, strict=True):
        assert_close(np.concatenate(pieces), expected)


def test_the_order_of_rows_does_not_matter(fixture: Fixture):
    prompts = fixture.prompts
    forward = run(fixture.executor, *[(slot, 0, prompt.tokens) for slot, prompt in enumerate(prompts)])
    backward = run(
        fixture.executor, *[(7 - slot, 0, prompt.tokens) for slot, prompt in reversed([*enumerate(prompts)])]
    )
    for logits, mirrored, prompt in zip(forward, reversed(backward), prompts, strict=True):
        assert_close(logits, prompt.logits)
        assert_close(mirrored, prompt.logits)


def test_drafts_that_were_wrong_are_taken_back(fixture: Fixture):
    tokens, wrong = fixture.long.tokens, fixture.long.tokens[::-1]
    said = []
    for begin in range(0, len(tokens), 3):
        right = tokens[begin : begin + 3]
        (logits,) = run(fixture.executor, (0, begin, [*right, *wrong[: begin % 5]]))
        said.append(logits[: len(right)])
    assert_close(np.concatenate(said), fixture.long.logits)


@pytest.mark.parametrize("length", [1, 19, 41])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_restored_row_is_like_fresh(fixture: Fixture, length: int, through_a_file: bool):
    executor, prompt = fixture.executor, fixture.long
    tokens = prompt.tokens + prompt.continuation
    fresh = run_in_pieces(executor, 0, tokens, length)[length:]
    run(executor, (1, 0, tokens[:length]))
    middle = length // 2
    spans = [(begin, end) for begin, end in ((0, middle), (middle, length)) if begin < end]
    kept = [executor.segment(1, length, begin, end) for begin, end in spans]
    checkpoint = executor.checkpoint(1, length) if executor.needs_checkpoints else None
    if through_a_file:
        kept = [executor.read_segment(dict(segment.arrays()), segment.length) for segment in kept]
        checkpoint = checkpoint and executor.read_checkpoint(dict(checkpoint.arrays()))
    # Another way on, which must not reach what was copied.
    run_in_pieces(executor, 1, tokens[:length] + tokens[::-1], 3 + length, begin=length)
    executor.release(1)
    for slot in (1, 3):
        executor.restore(slot, kept, checkpoint)
        assert_close(run_in_pieces(executor, slot, tokens, length + 2, length + 3, begin=length), fresh)


def test_two_branches_of_one_beginning_do_not_disturb_each_other(fixture: Fixture):
    executor, tokens = fixture.executor, fixture.long.tokens
    stem, left, right = tokens[:17], tokens[17:29], tokens[29:]
    expected = [run(executor, (5, 0, stem + branch))[0][len(stem) :] for branch in (left, right)]
    run(executor, (0, 0, stem))
    checkpoint = executor.checkpoint(0, len(stem)) if executor.needs_checkpoints else None
    executor.restore(1, [executor.segment(0, len(stem), 0, len(stem))], checkpoint)
    steps = [
        run(executor, (0, len(stem) + n, [a]), (1, len(stem) + n, [b]))
        for n, (a, b) in enumerate(zip(left, right, strict=False))
    ]
    assert_close(np.concatenate([a for a, _ in steps]), expected[0][: len(steps)])
    assert_close(np.concatenate([b for _, b in steps]), expected[1][: len(steps)])


def test_greedy_rows_together_continue_as_the_reference_does(fixture: Fixture):
    prompts = fixture.prompts
    chunks, done = [prompt.tokens for prompt in prompts], [0 for _ in prompts]
    generated: list[list[int]] = [[] for _ in prompts]
    for _ in prompts[0].continuation:
        rows = [(slot, done[slot], chunk) for slot, chunk in enumerate(chunks)]
        done = [begin + len(chunk) for _, begin, chunk in rows]
        chunks = [[int(logits[-1].argmax())] for logits in run(fixture.executor, *rows)]
        for tokens, chunk in zip(generated, chunks, strict=True):
            tokens.extend(chunk)
    assert generated == [prompt.continuation for prompt in prompts]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_model_says_what_its_configuration_says(name: str):
    config = json.loads((HERE / name / "config.json").read_text())
    config = config.get("text_config", config)
    model = build_model(open_checkpoint(str(HERE / name), HERE / "no-store").config)
    assert model.config.vocab_size == config["vocab_size"]
    assert model.config.num_layers == config["num_hidden_layers"]
    if all(isinstance(state, KV) for state in model.state):
        assert len(model.state) == model.config.num_layers - config.get("num_kv_shared_layers", 0)
    assert model.context_length == config.get("max_position_embeddings", WITHOUT_POSITIONS)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("twin", GGUF_TWINS)
def test_a_gguf_file_gives_the_logits_of_its_folder(twin: str, kind: str):
    name, _, rounding = twin.partition("-")
    executor = load(HERE / f"{twin}.gguf", kind)
    prompts = read_prompts(name)
    if rounding:
        rounded = load_file(HERE / f"{twin}.safetensors")["logits.0"]
        prompts = [Prompt(prompts[0].tokens, rounded, [])]
    for prompt in prompts:
        (logits,) = run(executor, (0, 0, prompt.tokens))
        executor.release(0)
        assert_close(logits, prompt.logits)
    executor.close()


@pytest.mark.parametrize("twin", [twin for twin in GGUF_TWINS if "-" in twin])
def test_on_a_cpu_the_bits_of_a_row_with_quantised_weights_do_not_depend_on_its_company(twin: str):
    executor = load(HERE / f"{twin}.gguf", "onnx", weights="keep")
    own, other, short = (prompt.tokens for prompt in read_prompts(twin.partition("-")[0]))
    prefilled = 30
    ends = range(prefilled, len(own))
    alone = run_in_pieces(executor, 0, own, *ends)
    beside = [run(executor, (3, 0, own[:prefilled]), (1, 0, other), (2, 0, short))[0]]
    beside += [run(executor, (1, 0, other[: 1 + place % 7]), (3, place, own[place : place + 1]))[1] for place in ends]
    executor.close()
    np.testing.assert_array_equal(np.concatenate(beside), alone)
