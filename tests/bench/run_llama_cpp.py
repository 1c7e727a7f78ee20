"""Contestant: llama.cpp by its C functions, from the library that llama-cpp-python builds for this processor."""

import ctypes
import importlib.metadata
import time
from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np

from tests.bench.measurement import Job, answer, measure, read_job

PIECE_BYTES = 256
BATCH_TOKENS = 512


class Llama:
    """A model and its context, greedy."""

    def __init__(self, job: Job) -> None:
        llama_cpp.llama_backend_init()
        weights = llama_cpp.llama_model_default_params()
        # Its AMX kernels crash with a general protection fault on Q4_1 (ggml-org/llama.cpp#20824). Of what this
        # switches off, nothing else is for Q4_1 or F32.
        weights.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(job.model).encode(), weights)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = 1024 + job.tokens
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = job.threads
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot load {job.model}")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[str]:
        """The text of one token at a time."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        token = self._next(ids)
        for left in reversed(range(tokens)):
            yield self._piece(token)
            if left:
                token = self._next([token])

    def _next(self, ids: Sequence[int]) -> int:
        batch = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(batch, len(ids))) != 0:
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._size,)).argmax())

    def _piece(self, token: int) -> str:
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        size = llama_cpp.llama_token_to_piece(self._vocabulary, token, buffer, PIECE_BYTES, 0, True)
        return buffer.raw[:size].decode(errors="replace")


def run(job: Job) -> None:
    model = Llama(job)
    load_s = time.monotonic() - job.started
    system = " ".join(llama_cpp.llama_print_system_info().decode().split())
    versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python"), "llama.cpp built with": system}
    answer(measure(job, load_s, model.generate, versions))


if __name__ == "__main__":
    run(read_job())
