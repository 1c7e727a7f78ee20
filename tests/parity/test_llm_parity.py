"""Five equalities for every language architecture, against what transformers says of tiny random checkpoints.

README.md in this folder says what each fixture is for. All comparisons are in float32, of whole logits.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.cache import LayerCache
from models.checkpoint import open_checkpoint
from models.gemm import few_rows_gemm, host_gemm
from models.llm import discover, load_language_model
from models.llm.base import LanguageModel, Row
from models.nn import fused

HERE = Path(__file__).parent
FOLDERS = sorted(folder.parent.name for folder in HERE.glob("*/reference.safetensors"))
GGUF_TWINS = sorted(file.stem for file in HERE.glob("*.gguf"))
TOLERANCE = 1e-4

# The ways a model computes: MLX's graph, and the CPU's form with each BLAS that could be there.
FORMS = {"plain": None, "fused": few_rows_gemm, "fused, MLX's BLAS": host_gemm}

Cache = Sequence[LayerCache]


def runs() -> list[tuple[str, str]]:
    return list(product(FOLDERS, FORMS))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a fixture with the reference's answers to it."""

    tokens: list[int]
    logits: np.ndarray
    continuation: list[int]


@dataclass(frozen=True, slots=True)
class Fixture:
    model: LanguageModel
    config: dict[str, object]
    prompts: list[Prompt]

    @property
    def long(self) -> Prompt:
        return self.prompts[0]


def load(path: Path, *, fuse: bool = False) -> LanguageModel:
    return load_language_model(open_checkpoint(str(path), HERE / "no-store"), policy="float32", fuse=fuse)


def read_prompts(folder: Path) -> list[Prompt]:
    arrays = load_file(folder / "reference.safetensors")
    return [
        Prompt(arrays[f"prompt.{n}"].tolist(), arrays[f"logits.{n}"], arrays[f"continuation.{n}"].tolist())
        for n in range(len(arrays) // 3)
    ]


@pytest.fixture(scope="module", params=runs(), ids="-".join)
def fixture(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    name, form = request.param
    folder = HERE / name
    with pytest.MonkeyPatch.context() as patch:
        if (gemm := FORMS[form]) is not None:
            patch.setattr(fused, "few_rows_gemm", gemm)
        model = load(folder, fuse=form != "plain")
        assert isinstance(model, fused.FusedDecoder) == (form != "plain")
        yield Fixture(model, json.loads((folder / "config.json").read_text()), read_prompts(folder))


def run(model: LanguageModel, *rows: tuple[Sequence[int], Cache]) -> list[np.ndarray]:
    """One step of a ragged batch; each row's logits, (L, V)."""
    flat = mx.array([token for tokens, _ in rows for token in tokens], dtype=mx.int32)
    hidden = model(flat, [Row(len(tokens), cache) for tokens, cache in rows])
    logits = np.array(model.logits(hidden))
    ends = np.cumsum([len(tokens) for tokens, _ in rows])
    return np.split(logits, ends[:-1])


def run_in_pieces(model: LanguageModel, tokens: Sequence[int], cache: Cache, *ends: int) -> np.ndarray:
    """One row in several steps that end before the given positions and at the end. Shapes: returns (L, V)."""
    bounds = [0, *ends, len(tokens)]
    pieces = [run(model, (tokens[a:b], cache))[0] for a, b in pairwise(bounds) if a < b]
    return np.concatenate(pieces)


def snapshot(cache: Cache) -> list[LayerCache]:
    return [layer.snapshot() for layer in cache]


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_every_architecture_has_a_fixture():
    configs = [json.loads((HERE / name / "config.json").read_text()) for name in FOLDERS]
    covered = {name for config in configs for name in config["architectures"]}
    declared = {name for architecture in discover() for name in architecture.hf}
    assert declared - covered == set()


def test_every_fixture_has_an_architecture():
    declared = {name for architecture in discover() for name in architecture.hf}
    covered = {json.loads((HERE / name / "config.json").read_text())["architectures"][0] for name in FOLDERS}
    assert covered - declared == set()


def test_the_logits_are_the_references_at_every_position(fixture: Fixture):
    for prompt in fixture.prompts:
        (logits,) = run(fixture.model, (prompt.tokens, fixture.model.new_cache()))
        assert_close(logits, prompt.logits)


@pytest.mark.parametrize("size", [5, 8, 9])
def test_a_prompt_in_chunks_is_the_prompt_in_one(fixture: Fixture, size: int):
    tokens = fixture.long.tokens
    ends = range(size, len(tokens), size)
    assert_close(run_in_pieces(fixture.model, tokens, fixture.model.new_cache(), *ends), fixture.long.logits)


@pytest.mark.parametrize("prefilled", [1, 24])
def test_prefill_then_decode_is_the_whole(fixture: Fixture, prefilled: int):
    prompt = fixture.long
    tokens = prompt.tokens + prompt.continuation
    (whole,) = run(fixture.model, (tokens, fixture.model.new_cache()))
    ends = range(prefilled, len(tokens))
    assert_close(run_in_pieces(fixture.model, tokens, fixture.model.new_cache(), *ends), whole)


def test_a_row_computes_the_same_in_any_company(fixture: Fixture):
    """Three rows that begin in different steps, in chunks of different lengths, one of them decoding all along."""
    model, prompts = fixture.model, fixture.prompts
    rows = [prompt.tokens + prompt.continuation for prompt in prompts]
    alone = [run(model, (tokens, model.new_cache()))[0] for tokens in rows]

    caches = [model.new_cache() for _ in rows]
    parts: list[list[np.ndarray]] = [[] for _ in rows]
    done = [0 for _ in rows]
    schedule = [(0, 0, 1), (13, 0, 1), (1, 6, 1), (20, 1, 1), (1, 11, 0), (9, 1, 3), (1, 1, 1), (1, 0, 2), (12, 7, 7)]
    for lengths in schedule:
        taking = [n for n, length in enumerate(lengths) if length]
        chunks = [(rows[n][done[n] : done[n] + lengths[n]], caches[n]) for n in taking]
        for n, logits in zip(taking, run(model, *chunks), strict=True):
            parts[n].append(logits)
            done[n] += lengths[n]
    assert done == [len(tokens) for tokens in rows], "the schedule runs every row to its end"
    for expected, pieces in zip(alone, parts, strict=True):
        assert_close(np.concatenate(pieces), expected)


def test_the_order_of_rows_does_not_matter(fixture: Fixture):
    model = fixture.model
    forward = run(model, *[(prompt.tokens, model.new_cache()) for prompt in fixture.prompts])
    backward = run(model, *[(prompt.tokens, model.new_cache()) for prompt in reversed(fixture.prompts)])
    for logits, mirrored, prompt in zip(forward, reversed(backward), fixture.prompts, strict=True):
        assert_close(logits, prompt.logits)
        assert_close(mirrored, prompt.logits)


@pytest.mark.parametrize("length", [1, 19, 41])
def test_a_restored_snapshot_is_like_fresh(fixture: Fixture, length: int):
    model, prompt = fixture.model, fixture.long
    tokens = prompt.tokens + prompt.continuation
    fresh = run_in_pieces(model, tokens, model.new_cache(), length)[length:]
    cache = model.new_cache()
    run(model, (tokens[:length], cache))
    kept = snapshot(cache)
    # Another way on, long enough to pass every window of the fixtures and to grow whatever grows.
    run_in_pieces(model, tokens[::-1], cache, 3, 4)
    for _ in range(2):
        restored = snapshot(kept)
        assert [layer.offset for layer in restored] == [length] * model.num_layers
        assert_close(run_in_pieces(model, tokens[length:], restored, 2, 3), fresh)


def test_two_branches_of_one_snapshot_do_not_disturb_each_other(fixture: Fixture):
    model, tokens = fixture.model, fixture.long.tokens
    stem, left, right = tokens[:17], tokens[17:29], tokens[29:]
    expected = [run(model, (stem + branch, model.new_cache()))[0][len(stem) :] for branch in (left, right)]
    cache = model.new_cache()
    run(model, (stem, cache))
    other = snapshot(cache)
    steps = [run(model, ([a], cache), ([b], other)) for a, b in zip(left, right, strict=False)]
    assert_close(np.concatenate([a for a, _ in steps]), expected[0][: len(steps)])
    assert_close(np.concatenate([b for _, b in steps]), expected[1][: len(steps)])


def test_greedy_rows_together_continue_as_the_reference_does(fixture: Fixture):
    model, prompts = fixture.model, fixture.prompts
    caches = [model.new_cache() for _ in prompts]
    chunks = [prompt.tokens for prompt in prompts]
    generated: list[list[int]] = [[] for _ in prompts]
    for _ in prompts[0].continuation:
        steps = run(model, *zip(chunks, caches, strict=True))
        chunks = [[int(logits[-1].argmax())] for logits in steps]
        for tokens, chunk in zip(generated, chunks, strict=True):
            tokens.extend(chunk)
    assert generated == [prompt.continuation for prompt in prompts]


def test_the_model_says_what_its_configuration_says(fixture: Fixture):
    model, config = fixture.model, fixture.config
    assert model.vocab_size == config["vocab_size"]
    assert model.num_layers == config["num_hidden_layers"] == len(model.new_cache())
    assert model.context_length == config["max_position_embeddings"]


def test_a_cache_holds_what_was_predicted(fixture: Fixture):
    model, tokens = fixture.model, fixture.long.tokens
    cache = model.new_cache()
    run_in_pieces(model, tokens, cache, 7, 8)
    assert sum(layer.nbytes for layer in cache) <= model.cache_nbytes(len(tokens))
    assert all(layer.offset == len(tokens) for layer in cache)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("twin", GGUF_TWINS)
def test_a_gguf_file_gives_the_logits_of_its_folder(twin: str, fuse: bool):
    name, _, kind = twin.partition("-")
    model = load(HERE / f"{twin}.gguf", fuse=fuse)
    prompts = read_prompts(HERE / name)
    if kind:
        rounded = load_file(HERE / f"{twin}.safetensors")["logits.0"]
        prompts = [Prompt(prompts[0].tokens, rounded, [])]
    for prompt in prompts:
        (logits,) = run(model, (prompt.tokens, model.new_cache()))
        assert_close(logits, prompt.logits)
