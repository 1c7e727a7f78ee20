"""How long it takes to build one decode step's graph on MLX, by the number of rows; nothing is evaluated.

A Llama of 32 layers and small sizes with random weights: `python -m tests.bench.graph [--mlx-lm-python PATH]`. With an
interpreter that has mlx_lm, its own model with a batched cache is measured beside ours. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = (1, 4, 8, 16)
REPEATS = 60
DEPTH = 64
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def best_ms(build: Callable[[], object], finish: Callable[[object], None]) -> float:
    """The best time of building; what was built is computed outside the clock."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        built = build()
        times.append(time.perf_counter() - begin)
        finish(built)
    return round(min(times) * 1e3, 3)


def ours() -> dict[int, float]:
    """Milliseconds by rows of this project's executor."""
    import mlx.core as mx
    import numpy as np

    from models.arch import build_model
    from models.executors.base import Row, Step
    from models.executors.mlx.executor import MLXExecutor
    from models.executors.mlx.slabs import layer_specs
    from models.executors.mlx.weights import Weights
    from models.ops import weights_in

    model, random = build_model(CONFIG), np.random.default_rng(0)
    weights = Weights()
    for weight in weights_in(model.weights):
        tensors = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in weight.tensors()}
        weights.add(weight, tensors, "keep", mx.float32)
    found = {}
    for count in ROWS:
        executor = MLXExecutor(model, weights, layer_specs(model.state, "f16", mx.float32, 64), 0)
        tokens = tuple(random.integers(0, 256, DEPTH).tolist())
        for slot in range(count):
            executor.forward(Step((Row(slot, 0, tokens, 0),)))
        at = iter(range(DEPTH, DEPTH + REPEATS))

        def build(executor=executor, count=count, at=at) -> Any:
            begin = next(at)
            return executor.built(Step(tuple(Row(slot, begin, (7,)) for slot in range(count))))

        found[count] = best_ms(build, lambda logits: mx.eval(logits.values))
    return found


def mlx_lm() -> dict[int, float]:
    """Milliseconds by rows of mlx_lm's model with its batched cache; runs in an interpreter that has it."""
    import mlx.core as mx
    from mlx_lm.models.cache import BatchKVCache
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs.from_dict(CONFIG))
    mx.eval(model.parameters())
    found = {}
    for count in ROWS:
        caches = [BatchKVCache([0] * count) for _ in range(CONFIG["num_hidden_layers"])]
        mx.eval(model(mx.zeros((count, DEPTH), dtype=mx.int32), cache=caches))
        token = mx.zeros((count, 1), dtype=mx.int32)
        found[count] = best_ms(lambda token=token, caches=caches: model(token, cache=caches), mx.eval)
    return found


def elsewhere(python: Path) -> dict[int, float]:
    """What that interpreter measures; empty if it cannot."""
    words = [str(python), __file__, "--only-mlx-lm"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        print(f"mlx_lm: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mlx-lm-python", type=Path, help="an interpreter that has mlx_lm")
    parser.add_argument("--only-mlx-lm", action="store_true", help="measure mlx_lm in this interpreter")
    asked = parser.parse_args()
    if asked.only_mlx_lm:
        print(json.dumps(mlx_lm()))
        return
    measured = {"ours": ours(), "mlx_lm": elsewhere(asked.mlx_lm_python) if asked.mlx_lm_python else {}}
    for name, times in measured.items():
        print(f"{name:<8}", ", ".join(f"{rows} rows {ms} ms" for rows, ms in times.items()) or "not measured")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
