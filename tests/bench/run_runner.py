"""Contestant: this project's runner, a real process spoken to over HTTP as Ollama would."""

import asyncio
import importlib.metadata
import time
from contextlib import aclosing

from runner.config import DialectName
from runner.parent import Child, spawn
from tests.bench.measurement import Job, Measurement, answer, read_job

FLOAT32_FLAGS = ("--weights=float32", "--activations=float32")


async def ask(child: Child, prompt: str, tokens: int) -> tuple[float, float, list[str], int, int]:
    """Seconds to the first token and from it to the last, the pieces, and the child's counts of prompt and answer."""
    begin = time.perf_counter()
    first: float | None = None
    pieces: list[str] = []
    prompt_tokens = eval_tokens = 0
    # In an Options object the keys that are absent are zero: greedy, no penalties.
    async with aclosing(child.complete(prompt, {"num_predict": tokens})) as stream:
        async for piece in stream:
            first = time.perf_counter() if first is None else first
            pieces.append(piece.content)
            if piece.done:
                prompt_tokens, eval_tokens = piece.prompt_tokens, piece.eval_tokens
    assert first is not None  # a stream without a line is a ChildError
    return first - begin, time.perf_counter() - first, pieces, prompt_tokens, eval_tokens


async def run(job: Job) -> Measurement:
    flags = [f"--threads={job.threads}", *(FLOAT32_FLAGS if job.float32 else ())]
    # Not `job.started`: what loads from here on is the child, while this process is the parent.
    started = time.monotonic()
    async with spawn(job.model, dialect=DialectName.MLX, flags=flags) as child:
        await child.wait_ready()
        load_s = time.monotonic() - started
        await ask(child, job.warmup, 4)
        first_s, decode_s, pieces, prompt_tokens, tokens = await ask(child, job.text, job.tokens)
        return Measurement(
            load_s=load_s,
            first_token_s=first_s,
            decode_s=decode_s,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            peak_rss_bytes=child.peak_memory_bytes() or 0,
            text="".join(pieces),
            versions={"ollama-mlx-runner": importlib.metadata.version("ollama-mlx-runner")},
        )


if __name__ == "__main__":
    answer(asyncio.run(run(read_job())))
