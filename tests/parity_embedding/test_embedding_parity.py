"""Every family of embedding models, on every executor, against what transformers and torch say of tiny ones.

README.md in this folder says what each fixture is for.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.arch import build_model, discover
from models.checkpoint import open_checkpoint
from models.embedding import EmbeddingModel, EmbeddingSettings, embedding_config, read_settings
from models.embedding.head import load_head
from models.tokenizer import Tokenizer, load_tokenizer
from tests.parity_embedding.texts import TEXTS

HERE = Path(__file__).parent
FOLDERS = sorted(folder.parent.name for folder in HERE.glob("*/reference.safetensors"))
TWINS = sorted(file.stem for file in HERE.glob("*.gguf"))
EXECUTORS = ("onnx", "mlx")
TOLERANCE = 2e-5
"""Vectors of ordinary size; the least that a feature moves one is 1e-4."""


@dataclass(frozen=True, slots=True)
class Fixture:
    model: EmbeddingModel
    tokenizer: Tokenizer
    settings: EmbeddingSettings
    ids: list[list[int]]
    vectors: list[np.ndarray]

    def embed(self, *texts: int, width: int | None = None) -> list[np.ndarray]:
        """The vectors of some of the fixture's texts, each in a pass with those that are padded alike."""
        found = {}
        for padded in {self.model.padded(len(self.ids[text])) for text in texts}:
            alike = [text for text in texts if self.model.padded(len(self.ids[text])) == padded]
            made = self.model.embed([self.ids[text] for text in alike], [width] * len(alike))
            found |= dict(zip(alike, made, strict=True))
        return [np.array(found[text], np.float32) for text in texts]


def load(path: Path, kind: str) -> tuple[EmbeddingModel, Tokenizer, EmbeddingSettings]:
    checkpoint = open_checkpoint(str(path), HERE / "no-store")
    settings = read_settings(checkpoint)
    assert settings is not None
    model = build_model(embedding_config(checkpoint.config))
    if kind == "onnx":
        from models.executors.onnx import OnnxOptions, load_embedder

        options = OnnxOptions(weights="float32", slots=8, capacity=512, threads=2)
        embedder = load_embedder(checkpoint, model, options)
    else:
        from models.executors.mlx import load_embedder as load_mlx

        embedder = load_mlx(checkpoint, model)
    return EmbeddingModel(embedder, load_head(checkpoint, settings)), load_tokenizer(checkpoint), settings


def reference(name: str) -> tuple[list[list[int]], list[np.ndarray]]:
    arrays = load_file(HERE / name / "reference.safetensors")
    count = len(arrays) // 2
    return [arrays[f"ids.{n}"].tolist() for n in range(count)], [arrays[f"vector.{n}"] for n in range(count)]


def fixture_of(path: Path, name: str, kind: str) -> Fixture:
    return Fixture(*load(path, kind), *reference(name))


@pytest.fixture(scope="module", params=list(product(FOLDERS, EXECUTORS)), ids="-".join)
def fixture(request: pytest.FixtureRequest) -> Iterator[Fixture]:
    name, kind = request.param
    made = fixture_of(HERE / name, name, kind)
    yield made
    made.model.close()


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_every_encoder_has_a_fixture():
    configs = [json.loads((HERE / name / "config.json").read_text()) for name in FOLDERS]
    covered = {name for config in configs for name in config["architectures"]}
    declared = {name for each in discover() for name in each.hf if each.is_encoder}
    assert declared - covered == set()


def test_the_tokens_are_the_references_whatever_truncation_the_vocabulary_carries(fixture: Fixture):
    assert fixture.tokenizer.encode_whole(TEXTS) == fixture.ids


def test_the_vectors_are_the_references(fixture: Fixture):
    for text, expected in enumerate(fixture.vectors):
        (vector,) = fixture.embed(text)
        assert_close(vector, expected)


def test_texts_in_company_have_the_vectors_that_they_have_alone(fixture: Fixture):
    """Each text three times, so that passes are full of texts of one padded length, and padding hides behind others."""
    together = fixture.embed(*range(len(TEXTS)))
    rows = [fixture.ids[0], fixture.ids[0][:-1], fixture.ids[0][:-2]]
    alike = [row for row in rows if fixture.model.padded(len(row)) == fixture.model.padded(len(rows[0]))]
    alone = [fixture.model.embed([row], [None])[0] for row in alike]
    company = fixture.model.embed(alike, [None] * len(alike))
    assert_close(np.array(company), np.array(alone))
    for vector, expected in zip(together, fixture.vectors, strict=True):
        assert_close(vector, expected)


def test_a_cut_vector_is_the_beginning_of_the_whole_normalised_where_that_is(fixture: Fixture):
    (cut,) = fixture.embed(0, width=5)
    expected = fixture.vectors[0][:5]
    if fixture.settings.normalize:
        expected = expected / np.linalg.norm(expected)
    assert_close(cut, expected)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("twin", TWINS)
def test_a_gguf_file_gives_the_tokens_and_vectors_of_its_folder(twin: str, kind: str):
    made = fixture_of(HERE / f"{twin}.gguf", twin, kind)
    try:
        assert made.tokenizer.encode_whole(TEXTS) == made.ids
        for vector, expected in zip(made.embed(*range(len(TEXTS))), made.vectors, strict=True):
            assert_close(vector, expected)
    finally:
        made.model.close()
