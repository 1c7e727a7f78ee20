"""Real weights through the real process: all-MiniLM-L6-v2 beside transformers' vectors of the same texts."""

import json
from pathlib import Path

import numpy as np
import pytest

from runner.config import DialectName

pytestmark = [pytest.mark.model, pytest.mark.process]

REFERENCE = json.loads((Path(__file__).with_name("minilm_reference.json")).read_text())


def cosines(made: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (made * expected).sum(1) / np.linalg.norm(made, axis=1) / np.linalg.norm(expected, axis=1)


async def vectors(child) -> np.ndarray:
    """One request a text, as a parent asks, and the counts checked."""
    made = []
    for each in REFERENCE:
        vector, tokens = await child.embed(each["text"])
        assert tokens == each["tokens"]
        made.append(vector)
    return np.array(made)


EXPECTED = np.array([each["vector"] for each in REFERENCE])


@pytest.mark.parametrize(
    ("flags", "least"),
    [
        (("--executor=onnx",), 0.999999),
        (("--executor=mlx",), 0.99999),
        (("--executor=onnx", "--weights=int8", "--activations=int8"), 0.999),
    ],
    ids=["onnx", "mlx", "int8"],
)
async def test_vectors_of_real_weights_are_the_references(spawn_runner, minilm, flags, least):
    async with spawn_runner(minilm, DialectName.MLX, flags=flags) as child:
        await child.wait_ready()
        found = await vectors(child)
        assert cosines(found, EXPECTED).min() >= least
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


async def test_a_list_of_texts_has_the_bits_of_each_alone(spawn_runner, minilm):
    texts = [each["text"] for each in REFERENCE]
    async with spawn_runner(minilm, DialectName.MLX, flags=("--executor=onnx",)) as child:
        await child.wait_ready()
        alone = await vectors(child)
        async with child.session.post(child.url + "/embedding", json={"content": texts}) as response:
            together = np.array((await response.json())["embeddings"])
        np.testing.assert_array_equal(together, alone)


async def test_the_models_own_limit_is_256_tokens_and_nothing_is_cut(spawn_runner, minilm):
    async with spawn_runner(minilm, DialectName.MLX) as child:
        await child.wait_ready()
        for words, status in ((254, 200), (255, 400)):
            text = "lighthouse " * words
            async with child.session.post(child.url + "/embedding", json={"content": text}) as response:
                assert response.status == status
                body = await response.text()
        assert body == "the input length exceeds the context length\n"
