"""What rounding costs an embedding model: how far all pairs of sentences keep their order under `--weights int8`."""

import argparse
import os
import re
from itertools import combinations

import numpy as np

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.device import usable_cores
from models.embedding import EmbeddingModel, embedding_config, read_settings
from models.embedding.head import load_head
from models.executors.onnx import OnnxOptions, load_embedder
from models.tokenizer import load_tokenizer
from runner.folders import cache_folder
from tests.bench.embed_preparation import fetch_minilm
from tests.bench.figures import Goal, say, show
from tests.bench.preparation import PROMPT

FORMS = {
    "int8 weights, int8 activations": OnnxOptions(weights="int8", activations="int8", capacity=512),
    "int8 weights, float32 activations": OnnxOptions(weights="int8", activations="float32", capacity=512),
    "int4 weights, int8 activations": OnnxOptions(weights="int4", activations="int8", capacity=512),
}


def sentences() -> list[str]:
    """Of the prompt, those of five words and more."""
    found = re.split(r"(?<=[.?!])\s+", PROMPT.read_text().replace("\n", " "))
    return [sentence for sentence in found if len(sentence.split()) >= 5]


def vectors(options: OnnxOptions, texts: list[str]) -> np.ndarray:
    """One a row, of length one."""
    checkpoint = open_checkpoint(str(fetch_minilm(cache_folder(os.environ), say)), PROMPT.parent)
    settings = read_settings(checkpoint)
    assert settings is not None
    embedder = load_embedder(checkpoint, build_model(embedding_config(checkpoint.config)), options)
    model = EmbeddingModel(embedder, load_head(checkpoint, settings))
    made = [model.embed([ids], [None])[0] for ids in load_tokenizer(checkpoint).encode_whole(texts)]
    model.close()
    return np.array(made)


def pair_cosines(made: np.ndarray) -> np.ndarray:
    first, second = np.array(list(combinations(range(len(made)), 2))).T
    return (made[first] * made[second]).sum(1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of values without ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.embed_quality", description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.parse_args()
    texts = sentences()
    exact = vectors(OnnxOptions(weights="float32", activations="float32", capacity=512), texts)
    cosines = pair_cosines(exact)
    rows, goals = [], []
    for name, options in FORMS.items():
        made = vectors(options, texts)
        rank, own = rank_correlation(cosines, pair_cosines(made)), (made * exact).sum(1)
        furthest = float(np.abs(pair_cosines(made) - cosines).max())
        rows.append([name, f"{rank:.5f}", f"{own.min():.5f}", f"{furthest:.4f}"])
        goals.append(Goal(f"rank correlation of {len(cosines)} pairs, {name}", [rank]))
    head = ["", "rank correlation of pairs", "least cosine with float32", "largest change of a pair"]
    show("What rounding costs embeddings", head, rows, goals, sentences=len(texts))


if __name__ == "__main__":
    main()
