"""Models with recurrent layers beside a plain one of about their size: prefill, decode, and a chat's second turn."""

import argparse
import json
import time
from collections.abc import Mapping
from math import prod
from typing import Any

from models.arch import build_model
from models.device import usable_cores
from models.executors.onnx import OnnxExecutor, OnnxOptions
from models.ops import Embedding, weights_in
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextDone, TextRequest
from tests.bench.bare import CHUNK_TOKENS, BareRows
from tests.bench.figures import Goal, run_module, say, show
from tests.bench.rows import random_ids, step_ms
from tests.fakes import ByteTokenizer
from tests.models.executors.checkpoints import RandomCheckpoint

PLAIN, PROMPT, TURN, STEPS = "plain", 512, 2000, 24
LEAST_OF_PLAIN, MOST_OF_FIRST_TURN = 0.5, 0.1
COMMON: Mapping[str, Any] = {
    "vocab_size": 42_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {"architectures": ["Qwen3ForCausalLM"]},
    "LFM2": {
        "architectures": ["Lfm2ForCausalLM"],
        "layer_types": ["full_attention" if layer % 4 == 3 else "conv" for layer in range(12)],
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 3072,
        "conv_L_cache": 3,
        "norm_eps": 1e-5,
    },
    "Mamba-2": {
        "architectures": ["Mamba2ForCausalLM"],
        "num_hidden_layers": 22,
        "expand": 2,
        "num_heads": 32,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
    },
    "Qwen3.5": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "layer_types": ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(12)],
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "head_dim": 128,
    },
}


def measure(name: str, threads: int) -> None:
    """One model in this process; one line of JSON."""
    checkpoint = RandomCheckpoint("F32", COMMON | SHAPES[name])
    model = build_model(checkpoint.config)
    held = OnnxOptions(weights="int4", slots=1, capacity=TURN + 1024, threads=threads)
    rows = BareRows(checkpoint, held)
    ids = random_ids(0, PROMPT)
    rows.prefill(0, 0, ids)
    begin = time.perf_counter()
    rows.prefill(0, 0, ids)
    prefill = PROMPT / (time.perf_counter() - begin)
    rows.executor.release(0)
    rows.prefill(0, 0, ids)
    said = {"prefill": prefill, "decode": 1000 / step_ms(rows, 1, PROMPT, STEPS)}
    tables = [weight for weight in weights_in(model.weights) if not isinstance(weight, Embedding)]
    said["parameters"] = sum(prod(shape) for weight in tables for _, shape in weight.tensors())
    said["first"], said["second"] = _turns(rows.executor)
    print(json.dumps(said))


def _turns(executor: OnnxExecutor) -> tuple[float, float]:
    """Seconds to the first token of a chat of 2,000 tokens, and of its next turn."""
    executor.release(0)
    cache = PrefixCache(executor, 2 << 30)
    engine = TextEngine(
        executor,
        ByteTokenizer(),
        context_length=TURN + 512,
        parallel=1,
        prefill_chunk=CHUNK_TOKENS,
        prefix_cache=cache,
    )
    prompt, seconds = "".join(chr(97 + token % 26) for token in random_ids(1, TURN)), []
    for more in ("", " and another question of some forty letters"):
        prompt += more
        engine.add(len(seconds), engine.prepare(TextRequest(prompt, SamplingParams(temperature=0), num_predict=16)))
        done = None
        while not engine.idle:
            done = next((each for each in engine.step() if isinstance(each, TextDone)), done)
            engine.proceed()
        assert done is not None
        seconds.append(done.prompt_ns / 1e9)
    return seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.recurrent", description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", choices=[*SHAPES], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure is not None:
        measure(asked.measure, asked.threads)
        return
    said: dict[str, list[dict[str, float]]] = {name: [] for name in SHAPES}
    for number in range(asked.rounds):
        for name, rounds in said.items():
            say(f"round {number + 1}: {name}")
            words = ["tests.bench.recurrent", f"--measure={name}", f"--threads={asked.threads}"]
            rounds.append(run_module(words, threads=asked.threads))
    cells, goals = [], []
    for name, rounds in said.items():
        best = {key: max(each[key] for each in rounds) for key in ("prefill", "decode", "parameters")}
        turns = [each["second"] / each["first"] for each in rounds]
        # As if all had the plain one's parameters: time is what the products take, and the recurrence.
        beside = [
            each["prefill"] * each["parameters"] / (plain["prefill"] * plain["parameters"])
            for each, plain in zip(rounds, said[PLAIN], strict=True)
        ]
        cells.append(
            [
                name,
                f"{best['parameters'] / 1e6:.0f}",
                f"{best['prefill']:.0f}",
                f"{best['decode']:.1f}",
                f"{max(beside):.2f}",
                f"{min(turns):.3f}",
            ]
        )
        if name != PLAIN:
            goals.append(Goal(f"{name}: prefill over a plain model's of the same size", beside, LEAST_OF_PLAIN))
        goals.append(Goal(f"{name}: a second turn over the first", turns, MOST_OF_FIRST_TURN, "<="))
    titles = ["model", "parameters, M", "prefill, tok/s", "decode, tok/s", "over plain", "second turn"]
    show("Recurrent layers", titles, cells, goals, rounds=said)


if __name__ == "__main__":
    main()
