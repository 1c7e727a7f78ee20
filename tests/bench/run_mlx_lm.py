"""Contestant: mlx_lm in this process, as its users call it. With --blas, that library is loaded before MLX."""

import ctypes
import importlib.metadata
import os
import time
from collections.abc import Iterator

from tests.bench.measurement import Job, answer, measure, read_job


def run(job: Job) -> None:
    if job.blas is not None:
        ctypes.CDLL(str(job.blas), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
    from mlx_lm import load, stream_generate

    model, tokenizer, *_ = load(str(job.model))
    load_s = time.monotonic() - job.started

    def generate(ids: list[int], tokens: int) -> Iterator[str]:
        return (response.text for response in stream_generate(model, tokenizer, ids, max_tokens=tokens))

    versions = {name: importlib.metadata.version(name) for name in ("mlx-lm", "mlx")}
    answer(measure(job, load_s, generate, versions))


if __name__ == "__main__":
    run(read_job())
