"""Contestant: llama.cpp by its C functions, from the library that llama-cpp-python builds for this processor."""

import ctypes
import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from tests.bench.measurement import Job, answer, measure, read_job

PIECE_BYTES = 256
BATCH_TOKENS = 512
CONTEXT_STEP = 256
Place = tuple[int, int, int]
"""A row, a position and the token there."""


class Llama:
    """A model and a context of several rows, greedy. Implements `rows.Rows`."""

    def __init__(self, model: Path, *, rows: int, row_tokens: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        weights = llama_cpp.llama_model_default_params()
        # Its AMX kernels crash with a general protection fault on Q4_1 (ggml-org/llama.cpp#20824). Of what this
        # switches off, nothing else is for Q4_1 or F32.
        weights.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), weights)
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = rows
        settings.n_ctx = rows * -(-row_tokens // CONTEXT_STEP) * CONTEXT_STEP
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[str]:
        """The text of one token at a time."""
        self.rewind(0, 0)
        token = self.prefill(0, 0, ids)
        for position in range(len(ids), len(ids) + tokens):
            yield self._piece(token)
            if position + 1 < len(ids) + tokens:
                (token,) = self.step([(0, position, token)])

    def prefill(self, row: int, begin: int, ids: Sequence[int]) -> int:
        for start in range(0, len(ids), BATCH_TOKENS):
            chunk = [(row, begin + start + place, token) for place, token in enumerate(ids[start:][:BATCH_TOKENS])]
            self._decode(chunk, [place + 1 == len(chunk) for place in range(len(chunk))])
        return int(self._logits(-1).argmax())

    def step(self, places: Sequence[Place]) -> list[int]:
        self._decode(places, [True] * len(places))
        return [int(self._logits(place).argmax()) for place in range(len(places))]

    def rewind(self, row: int, begin: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, row, begin, -1)

    def all_logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits at each place of a text of its own, of one batch at most. Shapes: (T, V)."""
        self.rewind(0, 0)
        self._decode([(0, place, token) for place, token in enumerate(ids)], [True] * len(ids))
        return np.stack([self._logits(place) for place in range(len(ids))])

    def _decode(self, places: Sequence[Place], wanted: Sequence[bool]) -> None:
        batch = self._batch
        batch.n_tokens = len(places)
        for index, (row, position, token) in enumerate(places):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted[index]
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def _logits(self, place: int) -> npt.NDArray[np.float32]:
        """A view of one place's logits, which holds until the next batch. Shapes: (V,)."""
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(logits, shape=(self._size,))

    def _piece(self, token: int) -> str:
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        size = llama_cpp.llama_token_to_piece(self._vocabulary, token, buffer, PIECE_BYTES, 0, True)
        return buffer.raw[:size].decode(errors="replace")


def run(job: Job) -> None:
    model = Llama(job.model, rows=1, row_tokens=1024 + job.tokens, threads=job.threads)
    load_s = time.monotonic() - job.started
    system = " ".join(llama_cpp.llama_print_system_info().decode().split())
    versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python"), "llama.cpp built with": system}
    answer(measure(job, load_s, model.generate, versions))


if __name__ == "__main__":
    run(read_job())
