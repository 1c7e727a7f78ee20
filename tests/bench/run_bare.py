"""Contestant: the runner's model in the least loop that decodes with it, in this process: no server, no sampling."""

import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path

from models.checkpoint import open_checkpoint
from models.tokenizer import load_tokenizer
from tests.bench.bare import BareRows, options
from tests.bench.measurement import Job, answer, measure, read_job


def run(job: Job) -> None:
    checkpoint = open_checkpoint(str(job.model), Path())
    length = max(len(job.ids), len(job.warmup_ids)) + job.tokens
    rows = BareRows(checkpoint, options(float32=job.float32, rows=1, row_tokens=length, threads=job.threads))
    tokenizer = load_tokenizer(checkpoint)
    load_s = time.monotonic() - job.started

    def decode(ids: list[int], tokens: int) -> Iterator[str]:
        token = rows.prefill(0, 0, ids)
        for position in range(len(ids), len(ids) + tokens):
            yield tokenizer.piece(token).decode(errors="replace")
            if position + 1 < len(ids) + tokens:
                (token,) = rows.step([(0, position, token)])

    answer(measure(job, load_s, decode, {"onnxruntime": importlib.metadata.version("onnxruntime")}))


if __name__ == "__main__":
    run(read_job())
