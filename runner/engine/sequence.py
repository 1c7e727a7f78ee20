"""Sequence: one row, what it has read and said, and the one place where it ends.

Owns the row's token ids, counts and text; refuses to know what an array is. What the row remembers is in the executor's
slot whose number it has.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from typing import Protocol

from models.detokenizer import StreamingDetokenizer
from models.executors.base import EncodedPicture, Logits, Row
from models.sampling import Draw, Sampling, TokenCounts, uniform
from runner.engine.constraint import Constraint, PendingConstraint
from runner.engine.drafting import Drafter, RowDrafting
from runner.engine.sight import Sight
from runner.engine.stop import StopAutomaton, StopMatcher
from runner.engine.types import FinishReason, RequestId, TextChunk, TextDone, TokenLogprob

NO_SLOT = -1


class Vocabulary(Protocol):
    """What the engine asks of a tokenizer. Thread: any."""

    @property
    def adds_bos(self) -> bool:
        """Whether the model wants its prompts to begin with BOS."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens after which the model has nothing more to say."""
        ...

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """The ids of `text`."""
        ...

    def fewest_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, found without encoding it."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for."""
        ...

    def is_special(self, token: int) -> bool:
        """Whether the token steers the model rather than being text."""
        ...

    def detokenizer(self) -> StreamingDetokenizer:
        """For one row's answer."""
        ...


class SequenceStatus(Enum):
    """Where a row is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    HELD = "held"
    """Its prompt is read, and what its answer is held to is not known yet."""
    DECODE = "decode"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class PreparedText:
    """A checked and tokenised request."""

    tokens: list[int]
    """Where a picture stands a negative number: see `sight`."""
    sampling: Sampling
    seed: int
    penalty_window: int
    """Tokens the penalties look back on; 0: there are none."""
    limit: int
    """Tokens the row may hold, prompt and answer together."""
    keep: int
    """Tokens at the front that a context shift leaves alone."""
    num_predict: int | None
    shift: bool
    stops: StopAutomaton | None
    logprobs: bool
    top_logprobs: int
    draft: int = 0
    """Tokens drafted at once, at most."""
    constraint: PendingConstraint | None = None
    """What the answer is held to; the row's own from here on."""
    sight: Sight | None = None
    """Where pictures stand; None: there are none."""


@dataclass(slots=True)
class _Spoken:
    """A token's logprob and the characters of the row's text that it gave: [start, end)."""

    logprob: TokenLogprob
    start: int
    end: int


class Sequence:
    """One row of the batch."""

    def __init__(self, request_id: RequestId, prepared: PreparedText, tokenizer: Vocabulary) -> None:
        self.id = request_id
        self.request = prepared
        self.tokens = list(prepared.tokens)
        """What the row holds: after a context shift less than was said."""
        self.sight = prepared.sight
        """Where pictures stand among the tokens."""
        self.seen: dict[bytes, EncodedPicture] = {}
        """What the tower made of those that are still to be run, by their digests."""
        self.prompt_len = len(prepared.tokens)
        self.cached_len = 0
        self.slot = NO_SLOT
        """Where the executor keeps its state: from when it is let in until what it leaves is stored."""
        self.fed = 0
        """Tokens that the slot's state is of: `tokens[:fed]`, and perhaps one behind them that was not read yet."""
        self.unread = 0
        """Steps under way whose tokens for the row nobody has read yet."""
        self.stored = 0
        """Tokens of the row that the prefix cache has been given or has given."""
        self.rests: tuple[int, ...] = ()
        """Where prefill pauses until the row was stored, in order."""
        self.counts: TokenCounts | None = None
        """What penalties look back on."""
        self.first_logits: Logits | None = None
        """Of a row that is held: those of its first token."""
        self.drafting: RowDrafting | None = None
        self.status = SequenceStatus.WAITING
        self.generated = 0
        self.stop_token = False
        self.admitted_ns = 0
        self.first_ns = 0
        self.last_ns = 0
        self._stop_ids = tokenizer.stop_ids
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopMatcher(prepared.stops)
        self._reason: FinishReason | None = None
        self._ready: list[str] = []
        self._pushed = 0
        self._shown = 0
        self._unspoken: list[TokenLogprob] = []
        self._spoken: deque[_Spoken] = deque()

    def begin(self, make_drafter: Callable[[], Drafter]) -> None:
        """Enter the batch: from now on time counts. Thread: the executor's."""
        self.admitted_ns = time.perf_counter_ns()
        request = self.request
        if request.penalty_window:
            said = [token for token in request.tokens if token >= 0]
            self.counts = TokenCounts(said, request.penalty_window)
        if request.draft:
            self.drafting = RowDrafting(make_drafter(), request.draft)

    @property
    def constraint(self) -> Constraint | None:
        """What holds the answer to its format, once that is made. None also where there is none."""
        return None if (pending := self.request.constraint) is None else pending.made

    @property
    def may_speak(self) -> bool:
        """What the answer is held to, if to anything, is known."""
        return self.request.constraint is None or self.request.constraint.made is not None

    @property
    def unfed(self) -> int:
        """Tokens that prefill has still to run."""
        return len(self.tokens) - self.fed

    @property
    def until_rest(self) -> int:
        """Tokens that prefill may run before it pauses, or has no more to."""
        return next((place - self.fed for place in self.rests if place > self.fed), self.unfed)

    @property
    def rests_now(self) -> bool:
        """Prefill pauses here, and the row was not stored yet."""
        return self.fed in self.rests and self.stored < self.fed

    @property
    def held(self) -> int:
        """Known tokens that the slot's state is of."""
        return min(self.fed, len(self.tokens))

    @property
    def full(self) -> bool:
        """The context has no room for another token."""
        return len(self.tokens) >= self.request.limit

    @property
    def room(self) -> int:
        """Tokens that may follow the next one before the row ends or its context is full."""
        room = self.request.limit - len(self.tokens) - 1
        budget = self.request.num_predict
        return room if budget is None else min(room, budget - self.generated - 1)

    @property
    def may_run_ahead(self) -> bool:
        """Whether a step may be built on a token not yet read.

        Not if that ends the row or fills the context, nor if it decides which tokens may follow.
        """
        return self.room > 0 and self.constraint is None

    @property
    def failure(self) -> str | None:
        """Why the row cannot go on, whatever the model says."""
        return None if self.constraint is None else self.constraint.error

    @property
    def drafts_next(self) -> bool:
        """Whether the row wants to draft when its next step is built; its tokens must have been read then."""
        return self.drafting is not None and self.drafting.is_awake(self.generated)

    def draft(self, most: int) -> tuple[int, ...]:
        """At most so many guesses at what follows the row's newest token."""
        assert self.drafting is not None
        guesses = self.drafting.propose(self.tokens, min(self.room, most))
        if self.sight is not None:
            # Pictures may be repeated, but nobody says one.
            guesses = list(takewhile(lambda guess: guess >= 0, guesses))
        if self.constraint is not None and guesses:
            guesses = guesses[: self.constraint.admitted(guesses)]
        return tuple(guesses)

    def planned(self, tokens: Items[int], wanted: int) -> Row:
        """What an executor is told of the row if it runs `tokens` next; empty: the one that nobody has read yet."""
        if self.sight is None:
            return Row(self.slot, self.fed, tuple(tokens), wanted)
        return self.sight.row(self.slot, self.fed, tokens, wanted, self.seen)

    def draw(self, drafted: tuple[int, ...] = ()) -> Draw:
        """How the token behind the newest one, or behind what is drafted there, is drawn."""
        request = self.request
        return Draw(
            request.sampling,
            uniform(request.seed, self.generated + self.unread + len(drafted)),
            self.slot,
            counts=self.counts,
            drafted=drafted,
            unread=self.unread > 0,
            top_logprobs=request.top_logprobs if request.logprobs else None,
            mask=None if self.constraint is None else self.constraint.mask(len(drafted)),
        )

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> FinishReason | None:
        """Take the row's next token; the reason if the row ends with it. The one place where a sequence ends."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.push(token)
        if token in self._stop_ids:
            self.stop_token = True
            return self._end(FinishReason.STOP)
        self.generated += 1
        self._speak(self._detokenizer.push(token), logprob)
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._stops.matched or (self.constraint is not None and self.constraint.finished):
            return self._end(FinishReason.STOP)
        budget = self.request.num_predict
        if (budget is not None and self.generated >= budget) or (self.full and not self.request.shift):
            return self._end(FinishReason.LENGTH)
        return None

    def shift(self) -> None:
        """Make room: drop the older half of what follows `keep`, pictures as a whole. The slot must be filled anew."""
        begin = self.request.keep
        end = begin + max((self.request.limit - begin) // 2, 1)
        if self.sight is not None:
            begin, end = self.sight.outside(begin, ahead=False), self.sight.outside(end, ahead=True)
            self.sight = self.sight.without(begin, end)
        del self.tokens[begin:end]
        self.fed = 0

    def take_chunk(self) -> TextChunk | None:
        """What may be shown and was not yet: text, the logprobs of the tokens it came from."""
        text = "".join(self._ready)
        self._ready.clear()
        self._shown += len(text)
        logprobs: list[TokenLogprob] = []
        while self._spoken and (self._spoken[0].start < self._shown or self._spoken[0].end <= self._shown):
            logprobs.append(self._spoken.popleft().logprob)
        return TextChunk(self.id, text, tuple(logprobs)) if text or logprobs else None

    def done(self) -> TextDone:
        """The final counts."""
        assert self._reason is not None
        return TextDone(
            id=self.id,
            reason=self._reason,
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_len,
            prompt_ns=self.first_ns - self.admitted_ns,
            eval_tokens=self.generated,
            eval_ns=self.last_ns - self.first_ns,
            stop_token=self.stop_token,
            drafted_tokens=self.drafting.proposed if self.drafting else 0,
            accepted_tokens=self.drafting.accepted if self.drafting else 0,
        )

    def _speak(self, text: str, logprob: TokenLogprob | None) -> None:
        if logprob is not None:
            # A token that only begins a character is told together with the one that completes it.
            self._unspoken.append(logprob)
        if not text:
            return
        start, self._pushed = self._pushed, self._pushed + len(text)
        self._spoken.extend(_Spoken(entry, start, self._pushed) for entry in self._unspoken)
        self._unspoken.clear()
        if shown := self._stops.push(text):
            self._ready.append(shown)

    def _end(self, reason: FinishReason) -> FinishReason:
        if not self._stops.matched:
            # Bytes of a character that was not completed are dropped, as Ollama does; their tokens are still told of.
            self._spoken.extend(_Spoken(entry, self._pushed, self._pushed) for entry in self._unspoken)
            if held := self._stops.finish():
                self._ready.append(held)
        self.status = SequenceStatus.DONE
        self._reason = reason
        return reason
