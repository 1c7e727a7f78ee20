"""Contestant: llama.cpp, by the bindings that are built from its sources for this processor."""

import importlib.metadata
import time
from collections.abc import Iterator
from itertools import islice

import llama_cpp

from tests.bench.measurement import Job, answer, measure, read_job


def run(job: Job) -> None:
    model = llama_cpp.Llama(
        str(job.model),
        n_ctx=len(job.ids) + job.tokens + 8,
        n_batch=512,
        n_ubatch=512,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        verbose=False,
    )
    load_s = time.monotonic() - job.started

    def generate(ids: list[int], tokens: int) -> Iterator[str]:
        stream = model.generate(ids, temp=0.0, repeat_penalty=1.0)
        return (model.detokenize([token]).decode(errors="replace") for token in islice(stream, tokens))

    system = " ".join(llama_cpp.llama_print_system_info().decode().split())
    versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python"), "llama.cpp built with": system}
    answer(measure(job, load_s, generate, versions))


if __name__ == "__main__":
    run(read_job())
