"""Contestant: the runner's model in the least loop that decodes with it, in this process: no server, no sampling."""

import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path

from models import backend
from tests.bench.measurement import Job, answer, measure, read_job

CHUNK_TOKENS = 64
"""The runner's default on a CPU."""


def run(job: Job) -> None:
    report = backend.prepare(threads=job.threads)
    if report.warning is not None:
        raise SystemExit(report.warning)
    import mlx.core as mx

    from models import host
    from models.checkpoint import open_checkpoint
    from models.llm import Row, load_language_model
    from models.tokenizer import load_tokenizer

    backend.configure()
    checkpoint = open_checkpoint(str(job.model), Path())
    model = load_language_model(checkpoint, policy="float32")
    tokenizer = load_tokenizer(checkpoint)
    load_s = time.monotonic() - job.started

    def decode(ids: list[int], tokens: int) -> Iterator[str]:
        cache = model.new_cache()
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[start : start + CHUNK_TOKENS]
            hidden = model(mx.array(chunk, dtype=mx.int32), [Row(len(chunk), cache)])
            mx.async_eval([array for layer in cache for array in layer.arrays()])
        token = mx.argmax(model.logits(hidden[-1:]), axis=-1)
        mx.async_eval(token)
        for left in reversed(range(tokens)):
            following = token
            if left:
                following = mx.argmax(model.logits(model(token, [Row(1, cache)])), axis=-1)
                mx.async_eval(following)
            yield tokenizer.piece(host.to_ints(token)[0]).decode(errors="replace")
            token = following

    answer(measure(job, load_s, decode, {"mlx": importlib.metadata.version("mlx"), "BLAS": report.summary}))


if __name__ == "__main__":
    run(read_job())
