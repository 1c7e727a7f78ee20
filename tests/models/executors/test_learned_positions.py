"""Decoders with learned positions: each token has the row of its place, whatever its row's company and cuts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.arch import build_model
from models.executors.base import Executor, Row, Step
from tests.models.executors.checkpoints import CONFIG, RandomCheckpoint

FIRST = 2
TOKENS = tuple(np.random.default_rng(3).integers(0, 320, 40).tolist())


def executor(kind: str) -> Executor:
    """A model that says no more of a token than what its own and its place's embedding say together."""
    checkpoint = RandomCheckpoint("F32", CONFIG)
    model = build_model(checkpoint.config)

    def forward(ops: Any) -> Any:
        own = ops.add(ops.embed(model.weights.embed), ops.embed_positions(model.weights.embed, FIRST))
        return ops.rms_norm(own, model.weights.norm)

    model = replace(model, forward=forward)
    if kind == "onnx":
        from models.executors.onnx import OnnxExecutor, OnnxOptions
        from models.executors.onnx import load as load_onnx

        options = OnnxOptions(weights="float32", slots=3, capacity=64, activations="float32")
        return OnnxExecutor(load_onnx(checkpoint, model, options), model.config.vocab_size)
    from models.executors.mlx import load as load_mlx

    return load_mlx(checkpoint, model, policy="float32", longest_step=64)


def expected(tokens: tuple[int, ...], begin: int) -> np.ndarray:
    tensors = {tensor.name: np.asarray(tensor.value) for tensor in RandomCheckpoint("F32", CONFIG).tensors()}
    table, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    x = table[list(tokens)] + table[FIRST + begin : FIRST + begin + len(tokens)]
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + CONFIG["rms_norm_eps"]) * norm @ table.T


@pytest.mark.parametrize("kind", ["onnx", "mlx"])
def test_a_token_has_its_places_row_in_prefill_and_decode_and_beside_others(kind: str):
    run_by = executor(kind)
    run_by.forward(Step((Row(1, 0, TOKENS[:20], 1),)))
    found = run_by.forward(Step((Row(1, 20, TOKENS[20:21], 1), Row(0, 0, TOKENS[:9], 9))))
    assert found is not None
    wanted = np.concatenate([expected(TOKENS[20:21], 20), expected(TOKENS[:9], 0)])
    np.testing.assert_allclose(np.array(found.read()), wanted, rtol=0, atol=1e-4)
    run_by.close()
