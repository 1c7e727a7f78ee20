"""Embedders on ONNX Runtime: a text's bits do not depend on its company, in every form of the weights."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.embedding import embedding_config
from models.executors.onnx import OnnxOptions, load_embedder, recorder
from models.executors.onnx.loading import record
from models.ops import weights_in
from models.weights.matching import matched
from tests.models.executors.checkpoints import RandomCheckpoint


def load(folder, **options):
    checkpoint = open_checkpoint(str(folder), folder)
    settings = {"weights": "float32", "slots": 8, "capacity": 1024, "threads": 2} | options
    return load_embedder(checkpoint, build_model(embedding_config(checkpoint.config)), OnnxOptions(**settings))


def texts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(5, 150, length).tolist() for length in lengths]


@pytest.mark.parametrize("model", ["bert", "mpnet", "nomic_bert", "modernbert", "qwen3_embedding", "mistral_model"])
def test_a_texts_bits_are_the_same_alone_and_in_company(parity_embedding, model):
    embedder = load(parity_embedding / model)
    for some in (texts(17, 24, 20, 24, 18), texts(8, 1, 5, 2), texts(32, 32)):
        together = embedder.hidden(some)
        assert [len(each) for each in together] == [len(text) for text in some]
        for text, hidden in zip(some, together, strict=True):
            np.testing.assert_array_equal(embedder.hidden([text])[0], hidden)


def test_so_they_are_with_weights_in_eight_bits(minilm_like):
    embedder = load(minilm_like, weights="int8")
    some = texts(24, 17, 20)
    for text, hidden in zip(some, embedder.hidden(some), strict=True):
        np.testing.assert_array_equal(embedder.hidden([text])[0], hidden)


ENCODER = {
    "architectures": ["BertModel"],
    "vocab_size": 160,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}


def random_embedder(kind: str, **options):
    checkpoint = RandomCheckpoint(kind, ENCODER)
    settings = {"slots": 8, "capacity": 64, "threads": 2} | options
    return load_embedder(checkpoint, build_model(checkpoint.config), OnnxOptions(**settings))


@pytest.mark.parametrize("kind", ["affine4", "affine8", "Q4_1", "Q4_K", "Q8_0"])
def test_quantised_encoders_compute_with_the_files_exact_values(kind):
    some = texts(24, 17, 20)
    exact = random_embedder(kind, weights="float32", activations="float32").hidden(some)
    for own, hidden in zip(random_embedder(kind, activations="float32").hidden(some), exact, strict=True):
        np.testing.assert_allclose(own, hidden, atol=2e-5)


@pytest.mark.parametrize("kind", ["affine4", "Q4_1", "Q8_0"])
def test_quantised_encoders_give_a_text_the_same_bits_in_any_company(kind):
    embedder, some = random_embedder(kind), texts(24, 17, 20)
    for text, hidden in zip(some, embedder.hidden(some), strict=True):
        np.testing.assert_array_equal(embedder.hidden([text])[0], hidden)


@pytest.fixture(params=["F32", "Q8_0", "nomic_bert"])
def long_texts(request, parity_embedding, tmp_path):
    """Loads a model for texts of 1,024 tokens."""
    if request.param == "nomic_bert":
        folder = tmp_path / request.param
        shutil.copytree(parity_embedding / request.param, folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"n_positions": 1024}))
        return lambda: load(folder)
    checkpoint = RandomCheckpoint(request.param, ENCODER | {"max_position_embeddings": 1024})
    options = OnnxOptions(activations="float32", slots=8, capacity=1024, threads=2)
    return lambda: load_embedder(checkpoint, build_model(checkpoint.config), options)


def test_a_long_texts_scores_need_not_be_held(long_texts, monkeypatch):
    some = texts(1001, 257, 17)
    found = [long_texts().hidden([text])[0] for text in some]
    monkeypatch.setattr(recorder, "LONG", 1024)
    for text, hidden in zip(some, found, strict=True):
        np.testing.assert_allclose(hidden, long_texts().hidden([text])[0], atol=2e-5)


def test_long_texts_of_one_length_do_not_see_each_other(long_texts):
    embedder, some = long_texts(), texts(300, 300)
    for text, hidden in zip(some, embedder.hidden(some), strict=True):
        np.testing.assert_array_equal(embedder.hidden([text])[0], hidden)


IN_A_PROCESS_OF_ITS_OWN = """
from models.arch import build_model
from models.executors.onnx import OnnxOptions, load_embedder
from tests.bench.measurement import peak_rss_bytes
from tests.models.executors.checkpoints import RandomCheckpoint
from tests.models.executors.onnx.test_embedder import ENCODER, texts

config = ENCODER | {"max_position_embeddings": 4096, "num_attention_heads": 16}
checkpoint = RandomCheckpoint("F32", config)
embedder = load_embedder(checkpoint, build_model(config), OnnxOptions(capacity=4096, threads=2))
before = peak_rss_bytes()
embedder.hidden(texts(2048))
print(peak_rss_bytes() - before)
"""


def test_they_are_not_held():
    said = subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, check=True, text=True)
    scores = 16 * 2048**2 * 4
    assert int(said.stdout) < scores // 4


@pytest.mark.parametrize(("kind", "attention"), [("F32", "Attention"), ("Q8_0", "MultiHeadAttention")])
def test_an_encoders_attention_is_one_node_and_nothing_is_reshaped(kind, attention):
    checkpoint = RandomCheckpoint(kind, ENCODER)
    model = build_model(checkpoint.config)
    found = matched(weights_in(model.weights), checkpoint.infos(), "")
    ops = [node.op for node in record(model, found, OnnxOptions(capacity=64, hidden=True)).graph.nodes]
    assert ops.count(attention) == 2
    assert "Reshape" not in ops


@pytest.fixture
def minilm_like(tiny_bert, tmp_path):
    """The tiny BERT with widths that eight bits have blocks for."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "wide"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4})
    )
    sizes, rng = {24: 64, 40: 96}, np.random.default_rng(2)
    tensors = {
        name: rng.normal(0, 0.2, [sizes.get(size, size) for size in tensor.shape]).astype(np.float32)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_eight_bits_are_near_float32_and_take_less_memory(minilm_like):
    exact, rounded = load(minilm_like), load(minilm_like, weights="int8")
    (text,) = texts(30)
    a, b = exact.hidden([text])[0], rounded.hidden([text])[0]
    assert not np.array_equal(a, b)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99
    assert rounded.memory_bytes() < exact.memory_bytes()


def test_texts_up_to_a_bound_are_padded_to_eights_and_longer_ones_not_at_all(tiny_bert):
    embedder = load(tiny_bert)
    assert [embedder.padded(n) for n in (1, 8, 9, 250, 256, 257, 400)] == [8, 8, 16, 256, 256, 257, 400]


def test_a_closed_embedder_holds_nothing(tiny_bert):
    embedder = load(tiny_bert)
    assert embedder.memory_bytes() > 0
    embedder.close()
    assert embedder.memory_bytes() == 0
