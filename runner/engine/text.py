"""TextEngine: completions from a language model, several rows at a time.

Owns the rows, the steps under way and the order in which both advance; speaks plans of integers to an executor. Where
an executor only begins a step when it is told to (a GPU), the next one is begun on tokens that nobody has read yet, so
that the device does not wait for Python. A row that turns out to have ended has then been fed its own last token
already; what its slot holds of it is true, and only what is drawn behind it is thrown away.
"""

import gc
import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items

from models.errors import ExecutionError
from models.executors.base import Executor
from models.grammar import GrammarCompiler
from models.sampling import INVALID_TOKEN, Drawn
from runner.engine.admission import Admission, Usage, Verdict, usage
from runner.engine.batch import Batch, Run, UnderWay
from runner.engine.constraint import Constraints, MaskWorker
from runner.engine.drafting import Drafter, PromptLookup, StepCosts
from runner.engine.eye import Eye
from runner.engine.prefix_cache import PrefixCache
from runner.engine.preparation import encode, is_quick, prepare_text
from runner.engine.reporting import ProgressReport, figures, told
from runner.engine.row_store import RowStore
from runner.engine.scheduler import Chunk, Scheduler
from runner.engine.sequence import NO_SLOT, PreparedText, Sequence, SequenceStatus, Vocabulary
from runner.engine.types import EngineState, EngineStatus, Failed, Output, Request, RequestId
from runner.errors import GenerationError

logger = logging.getLogger("runner.engine")


class TextEngine:
    """An Engine for text. Thread: the executor's, except where a method says otherwise."""

    def __init__(
        self,
        executor: Executor,
        tokenizer: Vocabulary,
        *,
        context_length: int,
        parallel: int,
        prefill_chunk: int,
        max_waiting: int = 256,
        prefix_cache: PrefixCache | None = None,
        admission: Admission | None = None,
        draft: int = 0,
        make_drafter: Callable[[], Drafter] = PromptLookup,
        grammars: GrammarCompiler | None = None,
        eye: Eye | None = None,
    ) -> None:
        """Serve a model.

        Args:
            executor: What runs it.
            tokenizer: Its vocabulary.
            context_length: Tokens one row may hold.
            parallel: Rows in the batch; the executor has as many slots.
            prefill_chunk: Prompt tokens of one step at most.
            max_waiting: Requests that may queue behind them.
            prefix_cache: What rows leave to those that begin alike; None: nothing is kept.
            admission: Whether there is memory for a row; None: rows are let in unasked.
            draft: Tokens that a row may draft at once; 0: none.
            make_drafter: Makes what guesses for one row.
            grammars: Compiles formats for this vocabulary; None: one of its own.
            eye: What looks at pictures; None: requests with pictures are refused.
        """
        self._executor, self._tokenizer = executor, tokenizer
        self._context_length = context_length
        self._max_requests = parallel + max_waiting
        self._scheduler = Scheduler(parallel=parallel, prefill_chunk=prefill_chunk)
        self._store, self._eye = RowStore(executor, prefix_cache), eye or Eye()
        self._admission = admission
        self._usage = Usage()
        self._draft, self._make_drafter = draft, make_drafter
        self._costs = StepCosts()
        grammars = grammars or GrammarCompiler(tokenizer, executor.vocab_size)
        self._constraints = Constraints(grammars, tokenizer, executor.vocab_size)
        self._masks = MaskWorker()
        self._drafted_tokens = self._accepted_tokens = 0
        self._rows: dict[RequestId, Sequence] = {}
        self._under_way: deque[UnderWay] = deque()
        self._at_risk: list[Sequence] = []
        self._leaving: list[Sequence] = []
        self._outputs: list[Output] = []
        self._last_read_ns = 0
        self._stalled = self._looked = False
        self._report = ProgressReport()

    @property
    def max_requests(self) -> int:
        """How many requests may be running and waiting at once. Thread: any."""
        return self._max_requests

    @property
    def idle(self) -> bool:
        """No request is queued or running, or all that run are held."""
        return self._scheduler.idle or self._stalled

    def status(self) -> EngineStatus:
        """The present figures."""
        return EngineStatus(
            state=EngineState.READY,
            progress=1.0,
            context_length=self._context_length,
            memory_bytes=self._executor.memory_bytes() + self._store.nbytes + self._eye.memory_bytes(),
            prefix_cache_bytes=self._store.nbytes,
            image_cache_bytes=self._eye.cache_bytes,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of `text`; BOS only if the model has its prompts begin with it. Thread: any.

        Raises:
            BadRequest: the text is not Unicode.
        """
        return encode(self._tokenizer, text, add_bos=add_bos)

    def prepare(self, request: Request) -> PreparedText:
        """Check and tokenise; the memory by the figures of the last step. Thread: any.

        Raises:
            BadRequest: the request cannot be served. What `completion` gives may yet find out the same.
            NotImplementedHere: it is for pictures.
            PromptTooLong: prompt and one token do not fit, and truncation is not allowed.
            InsufficientMemory: there is none for it, and will not be when all others have ended.
            Busy: too many pictures wait.
        """
        prepared = prepare_text(
            request,
            self._tokenizer,
            self._constraints,
            vocab_size=self._executor.vocab_size,
            context_length=self._context_length,
            draft=self._draft,
            vision=self._eye.vision,
        )
        if (admission := self._admission) is not None:
            admission.check(prepared, self._usage)
        return prepared

    def is_quick(self, request: Request) -> bool:
        """See `Engine.is_quick`. Thread: any."""
        return is_quick(request)

    def completion(self, prepared: object) -> Callable[[], None] | None:
        """See `Engine.completion`: a grammar is compiled while the prompt is read. Thread: any."""
        assert isinstance(prepared, PreparedText)
        pending = prepared.constraint
        return None if pending is None or pending.made is not None else pending.complete

    def add(self, request_id: RequestId, prepared: object) -> None:
        """Queue what `prepare` returned."""
        assert isinstance(prepared, PreparedText)
        row = Sequence(request_id, prepared, self._tokenizer)
        self._rows[request_id] = row
        self._scheduler.add(row)

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request wherever it is."""
        if (row := self._rows.get(request_id)) is not None:
            self._retire(row)
            logger.info("completion cancelled", extra={"fields": figures(row)})

    def step(self) -> list[Output]:
        """Begin as many steps as may be under way, and read the oldest."""
        self._stalled = False
        self._admit()
        self._look()
        self._forget_unwanted()
        while len(self._under_way) <= self._executor.depth and not self._must_read_first and self._begin_step():
            pass
        if self._under_way:
            self._at_risk = [row for step in self._under_way for row in step.batch.rows]
            self._read(self._under_way.popleft())
            self._at_risk = []
        elif not self._leaving and not self._outputs and not self._looked:
            self._stalled = any(row.status is SequenceStatus.HELD for row in self._scheduler.running)
        self._forget_unwanted()
        self._report.look(self._scheduler.running)
        return self._take_outputs()

    def proceed(self) -> None:
        """Store what rows leave and have grown by, now that their tokens are told, and let slots go."""
        while self._leaving:
            self._store.store(self._leaving[0])
            self._vacate(self._leaving.pop(0))
        for row in self._scheduler.running:
            self._store.visit(row)
        self._usage = self._present_usage()

    def abandon(self, error: Exception) -> list[Output]:
        """After `step` or `proceed` raised: drop the rows it may have damaged, and all that could be spared.

        Returns what had been said before, then a Failed for each of them.
        """
        # It may have been for want of memory.
        self._store.clear()
        self._eye.give_back(self._eye.spare_bytes)
        damaged = {row.id: row for row in self._at_risk if row.id in self._rows}
        self._at_risk = []
        for row in damaged.values():
            # Without the traceback: its frames hold arrays, which must not leave this thread.
            self._fail(row, f"{type(error).__name__}: {error}")
        while self._leaving:
            self._vacate(self._leaving.pop(0))
        self._forget_unwanted()
        self._usage = self._present_usage()
        return self._take_outputs()

    def close(self) -> None:
        """Free everything; the engine is of no use afterwards."""
        for row in list(self._rows.values()):
            self._retire(row, sound=False)
        self._under_way.clear()
        self._at_risk, self._outputs, self._leaving = [], [], []
        self._store.close()
        self._eye.close()
        self._admission = None
        self._executor.close()
        self._masks.close()
        gc.collect()

    def _admit(self) -> None:
        # What cancelled rows hold is nobody's before it is stored.
        while not self._leaving and (row := self._scheduler.admit(self._may_run)) is not None:
            self._at_risk = [row]
            row.begin(self._make_drafter)
            self._store.fill(row, self._scheduler.chunk)
            row.cached_len = row.fed
        self._at_risk = []

    def _may_run(self, row: Sequence) -> bool:
        """Whether there is memory for a row, having made room for it; one for which there never is fails."""
        if self._admission is None:
            return True
        beside = self._present_usage()
        decision = self._admission.decide(row.request, beside)
        if decision.verdict is Verdict.REFUSE:
            self._fail(row, str(self._admission.refusal(row.request, beside)))
        elif decision.give_up:
            self._store.give_back(decision.give_up - self._eye.give_back(decision.give_up), row)
        return decision.verdict is Verdict.ADMIT

    def _present_usage(self) -> Usage:
        return usage(self._scheduler.running, self._scheduler.waiting, self._store.nbytes + self._eye.spare_bytes)

    def _look(self) -> None:
        """Have the first prompt that waits for it look at its next picture, a piece; steps are timed without that."""
        chunk = self._scheduler.next_chunk(self._eye.misses)
        self._looked = chunk is not None
        if chunk is not None:
            self._at_risk = [chunk.row]
            try:
                self._eye.look(chunk.row, chunk.end)
            except ExecutionError as error:
                self._fail(chunk.row, f"the image could not be looked at: {error}")
            self._at_risk = []
            self._last_read_ns = time.perf_counter_ns()

    def _take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _forget_unwanted(self) -> None:
        """Nobody waits for steps whose rows are all gone."""
        wanted = [step for step in self._under_way if any(row.id in self._rows for row in step.batch.rows)]
        self._under_way = deque(wanted)

    @property
    def _must_read_first(self) -> bool:
        """The newest step has to be read before another can be begun."""
        if not self._under_way:
            return False
        return self._under_way[-1].must_be_read_first or any(row.rests_now for row in self._scheduler.running)

    def _begin_step(self) -> bool:
        """Begin the step that follows all others; False if there is nothing to run."""
        batch = self._next_batch()
        if not batch.rows:
            return False
        self._at_risk = batch.rows
        self._under_way.append(batch.begin(self._executor, self._masks))
        self._at_risk = []
        if batch.chunk is not None:
            self._eye.forget(batch.chunk.row, behind=batch.chunk.row.fed)
        return True

    def _next_batch(self) -> Batch:
        """What runs next; of a row that was held and may speak now, no more than the draw from what it has."""
        for row in self._scheduler.running:
            if row.status is SequenceStatus.HELD and row.may_speak:
                return Batch((), Chunk(row, 0, is_last=True))
        chunk = self._scheduler.next_chunk(self._eye.sees)
        mute = chunk is not None and chunk.is_last and not chunk.row.may_speak
        return Batch(tuple(self._decoding()), chunk, mute=mute)

    def _decoding(self) -> list[Run]:
        """The rows that decode in the next step, with what they draft."""
        rows = [row for row in self._scheduler.running if row.status is SequenceStatus.DECODE]
        rows = [row for row in rows if not row.unread or row.may_run_ahead]
        # Steps without drafts are to be measured now and then: what drafts cost is judged by them.
        drafts = self._scheduler.has_prompts or not self._costs.needs_measuring(len(rows))
        room = self._executor.draft_room
        return [
            Run(row, row.draft(room(row.fed)) if drafts and row.drafts_next and not row.unread else ()) for row in rows
        ]

    def _read(self, step: UnderWay) -> None:
        """Wait for a step, and hand each row its tokens."""
        drawn = step.read()
        now = time.perf_counter_ns()
        runs, tokens = step.batch.runs, sum(map(len, drawn))
        self._observe(step.batch, tokens, (now - max(step.begun_ns, self._last_read_ns)) / 1e9)
        self._last_read_ns = now
        drafted = tokens - len(runs)
        price = self._costs.price(len(runs), drafted) if drafted > 0 else 0.0
        for run, said in zip(runs, drawn, strict=True):
            run.row.unread -= 1
            if run.row.status is SequenceStatus.DECODE:
                run.row.first_ns = run.row.first_ns or now
                run.row.last_ns = now
                self._advance(run, said, price)

    def _observe(self, batch: Batch, tokens: int, seconds: float) -> None:
        """Learn from a step that took so long."""
        if batch.chunk is not None:
            self._scheduler.observe(batch.chunk.length, seconds)
        elif self._draft:
            self._costs.observe(tokens, seconds)

    def _advance(self, run: Run, drawn: Items[Drawn], price: float) -> None:
        """Give a row what was drawn, as far as it was drawn behind the right tokens."""
        row, accepted = run.row, run.accepted(drawn)
        said = drawn[: accepted + 1]
        taken, reason = 0, None
        while reason is None and row.failure is None and taken < len(said) and said[taken].token != INVALID_TOKEN:
            reason = row.accept(said[taken].token, told(said[taken], self._tokenizer.piece))
            taken += 1
        if (chunk := row.take_chunk()) is not None:
            self._outputs.append(chunk)
        if reason is None and (row.failure is not None or taken < len(said)):
            self._fail(row, row.failure or "the model's logits are not finite numbers")
            return
        self._settle(run, min(accepted, taken), price)
        if reason is not None:
            self._retire(row)
            self._outputs.append(row.done())
            logger.info("completion done", extra={"fields": {**figures(row), "reason": reason.value}})
        elif row.full:
            self._shift(row)

    def _settle(self, run: Run, accepted: int, price: float) -> None:
        """Keep the drafts that were right, and learn from them and the others."""
        row, proposed = run.row, len(run.drafts)
        row.fed += accepted
        if row.drafting is not None and proposed:
            row.drafting.observe(proposed, accepted, price=price, generated=row.generated)
            self._drafted_tokens += proposed
            self._accepted_tokens += accepted

    def _shift(self, row: Sequence) -> None:
        """Keys hold their positions, so what stays is run again: exact for every architecture."""
        before = len(row.tokens)
        row.shift()
        if row.drafting is not None:
            row.drafting.restart(self._make_drafter())
        self._store.fill(row, self._scheduler.chunk)
        row.status = SequenceStatus.PREFILL
        logger.debug("context shifted", extra={"fields": {"id": row.id, "before": before, "after": len(row.tokens)}})

    def _fail(self, row: Sequence, message: str) -> None:
        self._retire(row, sound=False)
        self._outputs.append(Failed(row.id, GenerationError(message)))
        logger.error("completion failed", extra={"fields": {**figures(row), "error": message}})

    def _retire(self, row: Sequence, *, sound: bool = True) -> None:
        """Take a row out; what its slot holds is stored if it is sound, then let go."""
        del self._rows[row.id]
        self._scheduler.remove(row)
        row.status = SequenceStatus.DONE
        self._eye.forget(row)
        if row.slot == NO_SLOT:
            return
        if sound:
            self._leaving.append(row)
        else:
            self._vacate(row)

    def _vacate(self, row: Sequence) -> None:
        self._executor.release(row.slot)
        self._scheduler.free(row)
