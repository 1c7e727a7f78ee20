"""EmbeddingEngine: vectors of texts, several in one pass.

Owns the texts that wait and the choice of those that share a pass. A step is one pass: texts that are padded alike,
whoever asked for them, up to a number of tokens, which bounds its memory. Requests take turns in leading a pass, so
that one of a thousand texts holds up nobody; within a pass the leader's texts come first, then those of the requests
behind it. Between two passes a request can be given up.
"""

import gc
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from models.embedding import NotFinite, Vector
from runner.engine.embedding_preparation import PreparedTexts, WholeTexts, prepare_texts
from runner.engine.preparation import QUICK_CHARACTERS, encode
from runner.engine.types import (
    EmbeddingDone,
    EmbeddingRequest,
    EngineState,
    EngineStatus,
    Failed,
    Output,
    Request,
    RequestId,
)
from runner.errors import GenerationError

logger = logging.getLogger("runner.engine")


class Embeds(Protocol):
    """What makes the vectors; see `models.embedding.EmbeddingModel`."""

    def padded(self, length: int) -> int:
        """What a text of so many tokens is padded to. Thread: any."""
        ...

    def embed(self, texts: Sequence[Sequence[int]], widths: Sequence[int | None]) -> Sequence[Vector | NotFinite]:
        """The vectors of texts of one padded length."""
        ...

    def memory_bytes(self) -> int:
        """Bytes held. Thread: any."""
        ...

    def give_back(self) -> None:
        """Return freed memory to the system. Thread: any."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@dataclass(slots=True)
class _Work:
    """A request under way. Times in ns."""

    id: RequestId
    prepared: PreparedTexts
    added_ns: int
    waiting: dict[int, deque[int]]
    """The texts that have no vector yet, by what they are padded to."""
    vectors: dict[int, Vector] = field(default_factory=dict)
    begun_ns: int = 0

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.prepared.texts))


class EmbeddingEngine:
    """An Engine for embeddings. Thread: the executor's, except where a method says otherwise."""

    def __init__(
        self,
        model: Embeds,
        tokenizer: WholeTexts,
        *,
        context_length: int,
        width: int,
        widths: Sequence[int] = (),
        lower_case: bool = False,
        pass_tokens: int = 512,
        max_requests: int = 512,
    ) -> None:
        """Serve a model.

        Args:
            model: What makes vectors.
            tokenizer: Its vocabulary.
            context_length: Tokens that a text may have.
            width: Values of a vector.
            widths: The only lengths that vectors may be cut to; empty: all.
            lower_case: Texts are put into lower case first.
            pass_tokens: Tokens of a pass, padding included, where it has more than one text.
            max_requests: Requests that may be under way and waiting.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._width, self._widths, self._lower_case = width, tuple(widths), lower_case
        self._pass_tokens = pass_tokens
        self._max_requests = max_requests
        self._queue: deque[_Work] = deque()
        self._at_risk: list[_Work] = []
        self._outputs: list[Output] = []

    @property
    def max_requests(self) -> int:
        """How many requests may be running and waiting at once. Thread: any."""
        return self._max_requests

    @property
    def idle(self) -> bool:
        """No request is queued or running."""
        return not self._queue

    def status(self) -> EngineStatus:
        """The present figures."""
        running = sum(work.begun_ns > 0 for work in self._queue)
        return EngineStatus(
            state=EngineState.READY,
            progress=1.0,
            context_length=self._context_length,
            memory_bytes=self._model.memory_bytes(),
            running=running,
            waiting=len(self._queue) - running,
        )

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of `text`. Thread: any. Raises BadRequest."""
        return encode(self._tokenizer, text, add_bos=add_bos)

    def prepare(self, request: Request) -> PreparedTexts:
        """Check and tokenise. Thread: any.

        Raises:
            BadRequest: the request cannot be served; a text that is too long among them.
            NoInput: a text has no tokens.
            NotImplementedHere: it is for text or pictures.
        """
        return prepare_texts(
            request,
            self._tokenizer,
            context_length=self._context_length,
            width=self._width,
            widths=self._widths,
            lower_case=self._lower_case,
        )

    def is_quick(self, request: Request) -> bool:
        """See `Engine.is_quick`. Thread: any."""
        return isinstance(request, EmbeddingRequest) and sum(map(len, request.texts)) <= QUICK_CHARACTERS

    def completion(self, prepared: object) -> None:
        """Nothing is left. Thread: any."""

    def add(self, request_id: RequestId, prepared: object) -> None:
        """Queue what `prepare` returned."""
        assert isinstance(prepared, PreparedTexts)
        waiting: dict[int, deque[int]] = {}
        for index, tokens in enumerate(prepared.texts):
            waiting.setdefault(self._model.padded(len(tokens)), deque()).append(index)
        self._queue.append(_Work(request_id, prepared, time.perf_counter_ns(), waiting))

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request wherever it is."""
        before = len(self._queue)
        self._queue = deque(work for work in self._queue if work.id != request_id)
        if len(self._queue) < before:
            logger.info("embedding cancelled", extra={"fields": {"id": request_id}})

    def step(self) -> list[Output]:
        """One pass."""
        if self._queue:
            leader = self._queue[0]
            self._queue.rotate(-1)
            chosen = list(self._chosen(leader))
            self._at_risk = list({work.id: work for work, _ in chosen}.values())
            self._run(chosen)
            self._at_risk = []
        outputs, self._outputs = self._outputs, []
        return outputs

    def proceed(self) -> None:
        """Nothing is left behind a step."""

    def abandon(self, error: Exception) -> list[Output]:
        """After `step` raised: fail the requests of its pass."""
        for work in self._at_risk:
            self._fail(work, f"{type(error).__name__}: {error}")
        self._at_risk = []
        self._model.give_back()
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """Free everything; the engine is of no use afterwards."""
        self._queue.clear()
        self._at_risk, self._outputs = [], []
        self._model.close()
        gc.collect()

    def _chosen(self, leader: _Work) -> Iterator[tuple[_Work, int]]:
        """The texts of a pass: of the leader's the longest that wait, then others that are padded alike."""
        padded = max(leader.waiting)
        room = max(self._pass_tokens // padded, 1)
        for work in (leader, *(work for work in self._queue if work is not leader)):
            texts = work.waiting.get(padded)
            while texts and room:
                room -= 1
                yield work, texts.popleft()
            if texts is not None and not texts:
                del work.waiting[padded]
            if not room:
                return

    def _run(self, chosen: list[tuple[_Work, int]]) -> None:
        now = time.perf_counter_ns()
        for work in self._at_risk:
            work.begun_ns = work.begun_ns or now
        texts = [work.prepared.texts[index] for work, index in chosen]
        vectors = self._model.embed(texts, [work.prepared.dimensions for work, _ in chosen])
        failed: dict[RequestId, _Work] = {}
        for (work, index), vector in zip(chosen, vectors, strict=True):
            if isinstance(vector, NotFinite):
                failed[work.id] = work
            else:
                work.vectors[index] = vector
        for work in self._at_risk:
            if work.id in failed:
                self._fail(work, "the model's embedding has values that are not finite numbers")
            elif not work.waiting:
                self._finish(work)

    def _finish(self, work: _Work) -> None:
        self._queue.remove(work)
        vectors = tuple(work.vectors[index] for index in range(len(work.prepared.texts)))
        self._outputs.append(EmbeddingDone(work.id, vectors, work.tokens))
        fields = {
            "id": work.id,
            "texts": len(vectors),
            "tokens": work.tokens,
            "wait_ms": round((work.begun_ns - work.added_ns) / 1e6, 1),
            "run_ms": round((time.perf_counter_ns() - work.begun_ns) / 1e6, 1),
        }
        # A line costs a short text a twentieth of its time, here and where it is read.
        logger.debug("embedding done", extra={"fields": fields})

    def _fail(self, work: _Work, message: str) -> None:
        self._queue = deque(other for other in self._queue if other is not work)
        self._outputs.append(Failed(work.id, GenerationError(message)))
        logger.error("embedding failed", extra={"fields": {"id": work.id, "error": message}})
