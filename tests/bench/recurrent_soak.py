"""Many requests with shared beginnings to a model with recurrent layers: no wrong token, and no growth.

`python -m tests.bench.recurrent_soak`: a tiny checkpoint, several rows at once, the prefix cache in memory and on disk,
drafts in every other engine, cancelled rows between; each answer beside that of an engine without any of it.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import psutil

from models.executors.base import Executor
from runner.engine.disk_cache import DiskCache
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import SamplingParams, TextRequest
from tests.fakes import ByteTokenizer
from tests.parity.executors import load
from tests.runner.engine.serving import run

FIXTURES = Path(__file__).parents[1] / "parity"
TOGETHER, REQUESTS_AN_ENGINE, CONTEXT = 3, 60, 448
LIMIT = 64 << 20


def engine(executor: Executor, folder: Path, *, draft: int) -> tuple[TextEngine, DiskCache]:
    """One with everything on."""
    disk = DiskCache(folder, "soak", limit_bytes=LIMIT)
    cache = PrefixCache(executor, 40 * executor.state_nbytes(200), disk)
    return plain(executor, prefix_cache=cache, draft=draft), disk


def plain(executor: Executor, **options) -> TextEngine:
    return TextEngine(executor, ByteTokenizer(), context_length=CONTEXT, parallel=TOGETHER, prefill_chunk=32, **options)


def letters(generator: random.Random, count: int) -> str:
    return "".join(generator.choices("abcdefgh ", k=count))


def soak(executor: Executor, requests: int, seed: int) -> dict[str, float]:
    """How many answers were wrong, how many tokens came from the cache, and by how much the process grew."""
    generator = random.Random(seed)
    texts, wrong, cached, process = [letters(generator, 200)], 0, 0, psutil.Process()
    sizes: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(0, requests, REQUESTS_AN_ENGINE):
            serving, disk = engine(executor, Path(folder), draft=3 * (number // REQUESTS_AN_ENGINE % 2))
            for _ in range(REQUESTS_AN_ENGINE // TOGETHER):
                prompts = [generator.choice(texts)[:250] + letters(generator, generator.randint(1, 60)) for _ in "abc"]
                asked = [TextRequest(each, SamplingParams(temperature=0), num_predict=8) for each in prompts]
                serving.add("gone", serving.prepare(asked[0]))
                serving.step()
                serving.cancel("gone")
                answers, right = run(serving, *asked), run(plain(executor), *asked)
                wrong += sum(one.text != other.text for one, other in zip(answers, right, strict=True))
                cached += sum(one.done.cached_tokens for one in answers)
                texts = [*texts[-30:], prompts[0] + answers[0].text]
            disk.close()
            sizes.append(process.memory_info().rss)
    half = len(sizes) // 2
    return {"requests": requests, "wrong": wrong, "cached": cached, "grown": sizes[-1] - sizes[half]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.recurrent_soak", description=__doc__)
    parser.add_argument("--fixtures", nargs="*", default=["lfm2", "mamba2"])
    parser.add_argument("--executor", default="onnx", choices=("onnx", "mlx"))
    parser.add_argument("--requests", type=int, default=540)
    asked = parser.parse_args()
    said = {
        name: soak(load(FIXTURES / name, asked.executor, slots=TOGETHER), asked.requests, seed=1)
        for name in asked.fixtures
    }
    for name, figures in said.items():
        print(f"{name}: {figures}")
    print(json.dumps(said))


if __name__ == "__main__":
    main()
