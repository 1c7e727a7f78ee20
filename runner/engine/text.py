"""TextEngine: completions from a language model, several rows at a time.

Owns the rows, the step in flight and the order in which both advance. Decoding is pipelined: the next step is built on
the tokens of the present one before the host has read them, so the device does not wait for Python. A row that turns
out to have ended has then been fed its own last token already; what the cache holds of it is true, and only what is
sampled from it is thrown away. A step on which drafts are to rest, or whose model computes when called, is read first.
"""

import gc
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens

import mlx.core as mx

from models import host
from models.llm.base import LanguageModel
from runner.engine.admission import Admission, Verdict
from runner.engine.batch import Batch, Run, Step, settle
from runner.engine.drafting import Drafter, PromptLookup, StepCosts
from runner.engine.prefix_cache import STORE_TOKENS, PrefixCache
from runner.engine.preparation import encode, prepare_text
from runner.engine.reporting import ProgressReport, figures
from runner.engine.sampler import INVALID_TOKEN, RowLogprobs
from runner.engine.scheduler import Scheduler
from runner.engine.sequence import PreparedText, Sequence, SequenceStatus, Vocabulary
from runner.engine.types import EngineState, EngineStatus, Failed, Output, Request, RequestId
from runner.errors import GenerationError

logger = logging.getLogger("runner.engine")


class TextEngine:
    """An Engine for text. Thread: the MLX thread, except where a method says otherwise."""

    def __init__(
        self,
        model: LanguageModel,
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
        overlaps: bool | None = None,
    ) -> None:
        """Serve `model`.

        Args:
            model: The model, loaded.
            tokenizer: Its vocabulary.
            context_length: Tokens one row may hold.
            parallel: Rows in the batch.
            prefill_chunk: Prompt tokens of one step at most.
            max_waiting: Requests that may queue behind them.
            prefix_cache: What rows leave to those that begin alike; None: nothing is kept.
            admission: Whether there is memory for a row; None: rows are let in unasked.
            draft: Tokens that a row may draft at once; 0: none.
            make_drafter: Makes what guesses for one row.
            overlaps: Whether a step is set off before the one ahead of it is read, so that the device never waits;
                None: always, but on a CPU only between steps without a prompt: there `mx.async_eval` does most work.
        """
        self._model: LanguageModel | None = model
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._max_requests = parallel + max_waiting
        self._scheduler = Scheduler(parallel=parallel, prefill_chunk=prefill_chunk)
        self._prefixes = prefix_cache
        self._admission = admission
        self._to_store: list[Sequence] = []
        self._draft, self._make_drafter = draft, make_drafter
        self._costs = StepCosts()
        self._drafted_tokens = self._accepted_tokens = 0
        self._rows: dict[RequestId, Sequence] = {}
        self._overlaps_prompts = mx.default_device() != mx.cpu if overlaps is None else overlaps
        self._overlaps_decoding = overlaps is not False
        self._builds_late = model.computes_when_called
        self._step: Step | None = None
        self._read_last: Step | None = None
        self._at_risk: list[Sequence] = []
        self._outputs: list[Output] = []
        self._last_read_ns = 0
        self._report = ProgressReport()

    @property
    def max_requests(self) -> int:
        """How many requests may be running and waiting at once. Thread: any."""
        return self._max_requests

    @property
    def idle(self) -> bool:
        """No request is queued or running."""
        return self._scheduler.idle

    def status(self) -> EngineStatus:
        """The present figures."""
        return EngineStatus(
            state=EngineState.READY,
            progress=1.0,
            context_length=self._context_length,
            memory_bytes=mx.get_active_memory() + mx.get_cache_memory(),
            prefix_cache_bytes=self._stored_bytes,
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
        """Check and tokenise. Thread: any.

        Raises:
            BadRequest: the request cannot be served.
            NotImplementedHere: it is for pictures.
            PromptTooLong: prompt and one token do not fit, and truncation is not allowed.
            InsufficientMemory: there is none for it, and will not be when all others have ended.
        """
        prepared = prepare_text(request, self._tokenizer, context_length=self._context_length, draft=self._draft)
        if (admission := self._admission) is not None:
            admission.check(prepared, tuple(self._scheduler.running), self._stored_bytes)
        return prepared

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
        """Read the step in flight, having built the next one on it."""
        self._admit()
        if self._step is None or not self._is_wanted(self._step):
            self._step = None
            self._step = self._build_late()
        if self._step is not None:
            self._run(self._step)
        if not self._scheduler.running:
            # Nobody waits for what would be sampled ahead.
            self._step = self._read_last = None
        self._report.look(self._scheduler.running)
        outputs, self._outputs = self._outputs, []
        return outputs

    def proceed(self) -> None:
        """Set off the step that was built ahead, or build it now, and store what rows have left."""
        if self._read_last is not None:
            self._step = self._build_late()
        if self._step is not None and self._is_wanted(self._step):
            self._at_risk = self._step.held
            self._step.set_off()
            self._at_risk = []
        self._store()

    def abandon(self, error: Exception) -> list[Output]:
        """After `step` or `proceed` raised: drop the rows it may have damaged, and all that could be spared.

        Returns what had been said before, then a Failed for each of them.
        """
        self._to_store = []
        if self._prefixes is not None:
            # It may have been for want of memory.
            self._prefixes.clear()
        damaged = {row.id: row for row in self._at_risk if row.id in self._rows}
        if self._step is not None and any(row.id in damaged for row in self._step.held):
            self._step = None
        self._at_risk = []
        for row in damaged.values():
            # Without the traceback: its frames hold arrays, which must not leave this thread.
            self._fail(row, f"{type(error).__name__}: {error}")
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self) -> None:
        """Free everything; the engine is of no use afterwards."""
        for row in list(self._rows.values()):
            self._retire(row)
        self._step, self._read_last, self._at_risk, self._outputs, self._to_store = None, None, [], [], []
        if self._prefixes is not None:
            self._prefixes.close()
        self._prefixes = self._admission = self._model = None
        mx.synchronize()
        gc.collect()
        mx.clear_cache()

    def _is_wanted(self, step: Step) -> bool:
        return any(row.id in self._rows for row in step.held)

    def _admit(self) -> None:
        for row in self._scheduler.admit(self._may_run):
            self._at_risk = [row]
            self._begin(row)
        self._at_risk = []

    def _may_run(self, row: Sequence) -> bool:
        """Whether there is memory for a row, having made room for it; one for which there never is fails."""
        if self._admission is None:
            return True
        running, prefixes, stored = self._scheduler.running, self._prefixes, self._stored_bytes
        decision = self._admission.decide(row.request, running, stored)
        if decision.verdict is Verdict.REFUSE:
            self._fail(row, str(self._admission.refusal(row.request, running, stored)))
        elif decision.give_up and prefixes is not None:
            prefixes.shrink(stored - decision.give_up, row.tokens)
            mx.clear_cache()
        return decision.verdict is Verdict.ADMIT

    @property
    def _stored_bytes(self) -> int:
        return 0 if self._prefixes is None else self._prefixes.nbytes

    def _run(self, step: Step) -> None:
        """Set a step off, build the next one meanwhile, read the step. Should anything raise, both steps are lost."""
        self._at_risk = step.held
        step.set_off()
        if self._builds_late:
            # Building computes: it would hold these tokens back, and so is done in `proceed`.
            self._read(step)
            self._step, self._read_last, self._at_risk = None, step, []
            return
        prompts_wait = self._scheduler.has_prompts
        only_decodes = step.chunk is None and not prompts_wait
        overlaps = self._overlaps_prompts or (self._overlaps_decoding and only_decodes)
        # On a CPU a chunk of a prompt is computed while it is built; the tokens must not wait for that.
        runs_ahead = (overlaps or not prompts_wait) and not step.must_be_read_first
        if not runs_ahead:
            self._read(step)
        ahead = self._build(after=step)
        if ahead is not None and overlaps:
            ahead.set_off()
        if runs_ahead:
            self._read(step)
        self._step, self._at_risk = ahead, []

    def _build(self, after: Step | None) -> Step | None:
        """The step that follows `after`, on whose tokens it rests, whether or not anyone has read them."""
        assert self._model is not None
        decode, tokens = self._decoding(after)
        chunk = self._scheduler.next_chunk()
        if not decode and chunk is None:
            return None
        batch = Batch(decode, tokens, chunk)
        self._at_risk = [*self._at_risk, *batch.held]
        return batch.build(self._model)

    def _build_late(self) -> Step | None:
        """The step that follows the one that was read last, if any."""
        after, self._read_last = self._read_last, None
        return self._build(after)

    def _decoding(self, after: Step | None) -> tuple[list[Run], mx.array | None]:
        """The runs behind a step, and their tokens: the host knows nothing of them yet if the step was not read."""
        if after is None or after.sampled is None:
            return [], None
        rows = [run.row for run in after.runs]
        if after.was_read:
            rows = [row for row in rows if row.status is SequenceStatus.DECODE]
            drafts = self._scheduler.has_prompts or not self._costs.needs_measuring(len(rows))
            runs = [Run(row, row.draft() if drafts else ()) for row in rows]
            tokens = [token for run in runs for token in (run.row.tokens[-1], *run.drafts)]
            return runs, mx.array(tokens, dtype=mx.int32) if runs else None
        picked = [n for n, row in enumerate(rows) if row.status is SequenceStatus.DECODE and row.may_run_ahead]
        if len(picked) == len(rows):
            return [Run(row) for row in rows], after.sampled.tokens
        return [Run(rows[n]) for n in picked], after.sampled.tokens[mx.array(picked)] if picked else None

    def _fill(self, row: Sequence) -> None:
        """Give a row a cache, and in it what is stored of its tokens."""
        assert self._model is not None
        row.cache = self._model.new_cache()
        row.fed = row.stored = 0
        if self._prefixes is not None:
            row.fed = row.stored = self._prefixes.fill(row.cache, row.tokens, chunk=self._scheduler.chunk)

    def _store(self) -> None:
        """Store rows that ended, and those that have grown; not those whose step failed."""
        if self._prefixes is None:
            return
        growing = [row for row in self._scheduler.running if row.fed - row.stored >= STORE_TOKENS]
        ended, self._to_store = self._to_store, []
        for row in [*ended, *growing]:
            self._prefixes.store(row.cache, row.tokens[: row.fed])
            row.stored = row.fed
        for row in ended:
            row.cache = []

    def _begin(self, row: Sequence) -> None:
        row.begin(self._make_drafter)
        self._fill(row)
        row.cached_len = row.fed

    def _read(self, step: Step) -> None:
        """Wait for a step, and hand each row its tokens."""
        tokens: list[int] = []
        logprobs: dict[int, RowLogprobs] = {}
        if step.sampled is None:
            host.wait(step.marker)
        else:
            tokens, logprobs = step.sampled.read()
        step.was_read = True
        now = time.perf_counter_ns()
        seconds = (now - max(step.begun_ns, self._last_read_ns)) / 1e9
        if step.chunk is not None:
            self._scheduler.observe(step.chunk.length, seconds)
        elif self._draft:
            self._costs.observe(len(tokens), seconds)
        self._last_read_ns = now
        drafted = len(tokens) - len(step.runs)
        price = self._costs.price(len(step.runs), drafted) if drafted > 0 else 0.0
        begin = 0
        for run in step.runs:
            end = begin + run.length
            if run.row.status is SequenceStatus.DECODE:
                run.row.first_ns = run.row.first_ns or now
                run.row.last_ns = now
                self._advance(run, tokens[begin:end], [logprobs.get(index) for index in range(begin, end)], price)
            begin = end

    def _advance(self, run: Run, sampled: Tokens[int], logprobs: Tokens[RowLogprobs | None], price: float) -> None:
        """Give a row what was sampled, as far as it was sampled behind the right tokens."""
        row, accepted = run.row, run.accepted(sampled)
        said = sampled[: accepted + 1]
        taken, reason = 0, None
        while reason is None and taken < len(said) and said[taken] != INVALID_TOKEN:
            logprob = logprobs[taken]
            reason = row.accept(
                said[taken], None if logprob is None else logprob.told(said[taken], self._tokenizer.piece)
            )
            taken += 1
        if (chunk := row.take_chunk()) is not None:
            self._outputs.append(chunk)
        if reason is None and taken < len(said):
            self._fail(row, "the model's logits are not finite numbers")
            return
        self._settle(run, min(accepted, taken), price)
        if reason is not None:
            self._retire(row)
            self._outputs.append(row.done())
            logger.info("completion done", extra={"fields": {**figures(row), "reason": reason.value}})
            return
        if row.sampler is not None:
            row.sampler.rewind(run.length - taken)
        if row.full:
            self._shift(row)

    def _settle(self, run: Run, accepted: int, price: float) -> None:
        """Keep the drafts that were right, forget the others, and learn from both."""
        row, proposed = run.row, len(run.drafts)
        settle(row, accepted)
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
        self._fill(row)
        row.status = SequenceStatus.PREFILL
        logger.debug("context shifted", extra={"fields": {"id": row.id, "before": before, "after": len(row.tokens)}})

    def _fail(self, row: Sequence, message: str) -> None:
        self._retire(row, sound=False)
        self._outputs.append(Failed(row.id, GenerationError(message)))
        logger.error("completion failed", extra={"fields": {**figures(row), "error": message}})

    def _retire(self, row: Sequence, *, sound: bool = True) -> None:
        """Take a row out; what its cache holds is stored if it is sound, then let go."""
        del self._rows[row.id]
        self._scheduler.remove(row)
        if sound:
            settle(row, 0)
        row.status = SequenceStatus.DONE
        row.sampler = None
        if sound and self._prefixes is not None and row.fed > row.stored:
            self._to_store.append(row)
        else:
            row.cache = []
