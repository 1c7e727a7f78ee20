"""Stand-ins that do real work in numpy: an executor in miniature and a vocabulary of bytes.

The hidden state of a token depends on every token before it by exact integer arithmetic, so chunking, company, a wrong
place or a mixed-up row all show in what is said.
"""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.detokenizer import StreamingDetokenizer
from models.errors import TokenizerError
from models.executors.base import Checkpoint, Row, Segment, Step
from models.grammar import Compiled, Grammar, GrammarCompiler
from models.sampling import Draw, Drawn
from models.sampling.host import sample

BOS = 256
EOS = 257
VOCABULARY = 258
SCRIPT = 0x10
"""A byte SCRIPT + k in a prompt makes the model say script k from there on, then EOS."""
POISON = 0x0E
"""After this byte the logits are NaN."""
BYTES_PER_TOKEN = 8
"""What a token takes in a slot, and in a segment."""
CHECKPOINT_BYTES = 64
"""What a checkpoint takes."""

FIRST_LOOK = 1000
"""What is held for a place of a picture is no less: no token is."""

_MODULUS = 1009
_NO_SCRIPT = -1
_AXES = 1 << 18
"""What is held for a token is a multiple of it more for every step that its position is off its place."""


@dataclass(frozen=True, slots=True)
class FakeSegment:
    """Some consecutive tokens of a row."""

    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return BYTES_PER_TOKEN * len(self.tokens)

    def part(self, begin: int, end: int) -> "FakeSegment":
        return FakeSegment(self.tokens[begin:end])

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "said", np.array([self.tokens], np.int32)
        yield "check", np.array([self.tokens], np.float32)


@dataclass(frozen=True, slots=True)
class FakeCheckpoint:
    """What a recurrent layer would remember of a row's first tokens: these."""

    tokens: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return CHECKPOINT_BYTES

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "remembered", np.array(self.tokens, np.int32)


class FakeLogits:
    """Logits of a step. Shapes: (N, V)."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def read(self) -> np.ndarray:
        return self._values

    def last(self) -> "FakeLogits":
        return FakeLogits(self._values[-1:])


class FakeSampled:
    """A step's tokens; the executor alone knows them before they are read."""

    def __init__(self, drawn: list[Drawn], before_read: Callable[[], None]) -> None:
        self.drawn = drawn
        self.was_read = False
        self._before_read = before_read

    def read(self) -> list[Drawn]:
        assert not self.was_read, "a step is read once"
        self.was_read = True
        self._before_read()
        return self.drawn


class FakeExecutor:
    """An Executor whose next token is a function of all tokens so far, or a script's next byte.

    `before_step(number, step)` is called at the beginning of each `forward`, in the thread that runs it: it may raise,
    wait, or take notes. Numbers count from 0. `before_read()` is called likewise when a step is read. Raises if it is
    driven in a way that no executor allows, or from two threads.
    """

    vocab_size = VOCABULARY

    def __init__(
        self,
        *scripts: str | bytes,
        depth: int = 0,
        window: int | None = None,
        draft_room: int = 64,
        recurrent: bool = False,
        before_step: Callable[[int, Step], None] | None = None,
        before_read: Callable[[], None] = lambda: None,
    ) -> None:
        self.depth = depth
        self.needs_checkpoints = recurrent
        self.steps = 0
        self.most_under_way = 0
        self.given_back = 0
        self.closed = False
        self.slots: dict[int, list[int]] = {}
        """What each slot in use holds: all of its tokens."""
        self.before_step = before_step
        self.before_read = before_read
        self._window, self._draft_room = window, draft_room
        self._last: dict[int, int] = {}
        self._under_way: weakref.WeakSet[FakeSampled] = weakref.WeakSet()
        self._thread: int | None = None
        encoded = [script.encode() if isinstance(script, str) else script for script in scripts]
        self.longest = max(map(len, encoded), default=0) + 1
        self._scripts = np.array([[*script, *[EOS] * (self.longest - len(script))] for script in encoded] or [[EOS]])

    def forward(self, step: Step) -> FakeLogits | None:
        self._check_use()
        assert step.rows, "a step of no rows"
        assert len({row.slot for row in step.rows}) == len(step.rows), "a slot is twice in a step"
        prefills = [row.wanted < row.length for row in step.rows]
        assert prefills == sorted(prefills), "rows that decode come first"
        under_way = sum(not sampled.was_read for sampled in self._under_way)
        assert under_way <= self.depth, "more steps are under way than may be"
        self.most_under_way = max(self.most_under_way, under_way + 1)
        number, self.steps = self.steps, self.steps + 1
        if self.before_step is not None:
            self.before_step(number, step)
        hidden = [self._fed(row) for row in step.rows]
        return FakeLogits(self.logits_of(np.concatenate(hidden))) if step.wanted else None

    def sample(self, logits: FakeLogits, draws: Sequence[Draw]) -> FakeSampled:
        self._check_use()
        for draw in draws:
            assert draw.slot in self.slots, "a draw for a slot that holds nothing"
            assert self.depth or not draw.unread, "where forward computes, tokens are known"
        known = [
            replace(draw, unread=False, drafted=(self._last[draw.slot], *draw.drafted)) if draw.unread else draw
            for draw in draws
        ]
        sampled = FakeSampled(sample(logits.read(), known), self.before_read)
        for draw, drawn in zip(draws, sampled.drawn, strict=True):
            self._last[draw.slot] = drawn.token
        self._under_way.add(sampled)
        return sampled

    def draft_room(self, begin: int) -> int:
        return self._draft_room

    def state_nbytes(self, tokens: int) -> int:
        return BYTES_PER_TOKEN * tokens

    def first_held(self, tokens: int) -> int:
        return 0 if self._window is None else max(0, tokens - self._window)

    def segment(self, slot: int, tokens: int, begin: int, end: int) -> FakeSegment:
        self._check_use()
        assert self.first_held(tokens) <= begin < end <= tokens <= len(self.slots[slot])
        return FakeSegment(tuple(self.slots[slot][begin:end]))

    def checkpoint(self, slot: int, tokens: int) -> FakeCheckpoint | None:
        self._check_use()
        own = self.slots[slot]
        return FakeCheckpoint(tuple(own)) if self.needs_checkpoints and len(own) == tokens else None

    def restore(self, slot: int, segments: Sequence[Segment], checkpoint: Checkpoint | None = None) -> None:
        self._check_use()
        assert slot not in self.slots, "only an empty slot is restored"
        own = [segment for segment in segments if isinstance(segment, FakeSegment)]
        assert len(own) == len(segments) > 0
        self.slots[slot] = [token for segment in own for token in segment.tokens]
        if self.needs_checkpoints:
            assert checkpoint == FakeCheckpoint(tuple(self.slots[slot])), "a checkpoint of other tokens"

    def read_segment(self, arrays: Mapping[str, np.ndarray], length: int) -> FakeSegment:
        self._check_use()
        if set(arrays) != {"said", "check"} or arrays["said"].dtype != np.int32:
            raise ValueError("its arrays are not those of this model's layers")
        assert arrays["said"].shape == (1, length)
        return FakeSegment(tuple(arrays["said"][0].tolist()))

    def read_checkpoint(self, arrays: Mapping[str, np.ndarray]) -> FakeCheckpoint:
        self._check_use()
        if set(arrays) != {"remembered"}:
            raise ValueError("its arrays are not those of this model's recurrent layers")
        return FakeCheckpoint(tuple(arrays["remembered"].tolist()))

    def release(self, slot: int) -> None:
        self._check_use()
        self.slots.pop(slot, None)
        self._last.pop(slot, None)

    def memory_bytes(self) -> int:
        return sum(self.state_nbytes(len(tokens)) for tokens in list(self.slots.values()))

    def give_back(self) -> None:
        self.given_back += 1

    def close(self) -> None:
        self._check_use()
        self.closed = True
        self.slots.clear()

    def living_slots(self) -> int:
        """How many slots hold anything."""
        return len(self.slots)

    def living_steps(self) -> int:
        """Of how many steps something still refers to the tokens."""
        gc.collect()
        return len(self._under_way)

    def logits_of(self, hidden: np.ndarray) -> np.ndarray:
        digest, last, script, place = (hidden[:, index : index + 1] for index in range(4))
        ids = np.arange(VOCABULARY)
        free = 6 * np.sin(digest * 0.37 + ids * (1.3 + (digest % 7)))
        # The end of a text is rare, but it comes.
        free = np.where(ids == EOS, free - 4, free)
        forbidden = (ids == BOS) | (ids == POISON) | ((ids >= SCRIPT) & (ids < SCRIPT + 16))
        free = np.where(forbidden, -np.inf, free)
        script_id = np.clip(script, 0, len(self._scripts) - 1)
        said = self._scripts[script_id, np.clip(place, 0, self.longest - 1)]
        scripted = np.where(ids == said, 60.0, 0.0) + 0.01 * np.sin(ids * 1.0)
        logits = np.where(script >= 0, scripted, free)
        return np.where(last == POISON, np.nan, logits).astype(np.float32)

    def _fed(self, row: Row) -> np.ndarray:
        """Run a row's tokens. Shapes: returns (wanted, 4)."""
        held = self.slots.setdefault(row.slot, [])
        assert 0 <= row.begin <= len(held), "a row begins behind what its slot holds"
        assert 0 <= row.wanted <= row.length
        assert row.tokens or self.depth, "where forward computes, tokens are known"
        held[row.begin :] = looked(row) if row.tokens else (self._last[row.slot] + _AXES * 3 * row.shift,)
        return hidden_of(held)[len(held) - row.wanted :]

    def _check_use(self) -> None:
        assert not self.closed, "a closed executor is used"
        if self._thread is None:
            self._thread = threading.get_ident()
        assert self._thread == threading.get_ident(), f"used in {threading.current_thread().name} as well"


def looked(row: Row) -> list[int]:
    """What is held for a row's tokens: of pictures what their rows say, of runs that look both ways all of it."""
    held = list(row.tokens)
    assert all(0 <= token < VOCABULARY for token in held), "no token of the vocabulary"
    for span in row.spans:
        assert 0 <= span.at <= span.at + span.end - span.begin <= len(held), "a span leaves its step"
        held[span.at : span.at + span.end - span.begin] = span.picture.rows[span.begin : span.end, 0].astype(int)
    for begin, end in row.runs:
        assert any((span.at, span.at + span.end - span.begin) == (begin, end) for span in row.spans), "a run of none"
        total = sum(held[begin:end]) % 9973
        held[begin:end] = [value + total for value in held[begin:end]]
    positions = row.positions or [(place + row.shift,) * 3 for place in range(row.begin, row.begin + len(held))]
    assert len(positions) == len(held)
    return [
        value + _AXES * (sum(position) - 3 * (row.begin + index))
        for index, (value, position) in enumerate(zip(held, positions, strict=True))
    ]


def hidden_of(tokens: Sequence[int]) -> np.ndarray:
    """Shapes: (S,) to (S, 4): a digest of the tokens so far, the last one, the script and the place in it."""
    whole = np.array(tokens)
    held = whole % _AXES
    places = np.arange(len(held))
    digest = np.cumsum((whole + 1) * (places % 31 + 1) * 17) % _MODULUS
    is_script = (held >= SCRIPT) & (held < SCRIPT + 16)
    code = np.maximum.accumulate(np.where(is_script, places * 16 + (held - SCRIPT), _NO_SCRIPT))
    script = np.where(code >= 0, code % 16, _NO_SCRIPT)
    place = np.where(code >= 0, places - code // 16, 0)
    return np.stack([digest, held, script, place], axis=-1)


class Gate:
    """A `before_step` that holds the model up at one step until it is opened."""

    PATIENCE_S = 60

    def __init__(self, step: int) -> None:
        self._step = step
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, number: int, step: Step) -> None:
        if number == self._step:
            self._reached.set()
            assert self._opened.wait(self.PATIENCE_S), "nobody opened the gate"

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, self.PATIENCE_S), "the model never came to the gate"

    def open(self) -> None:
        self._opened.set()


def scripted(script: int, prompt: str = "") -> str:
    """A prompt that makes the model say a script."""
    return prompt + chr(SCRIPT + script)


class ByteTokenizer:
    """A token is a byte; BOS and EOS come on top."""

    vocab_size = VOCABULARY
    stop_ids = frozenset({EOS})

    def __init__(self, *, adds_bos: bool = False) -> None:
        self.adds_bos = adds_bos

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        try:
            ids = list(text.encode())
        except UnicodeEncodeError as error:
            raise TokenizerError("half of a surrogate pair") from error
        return [BOS, *ids] if add_bos and self.adds_bos else ids

    def fewest_tokens(self, text: str) -> int:
        return len(text)

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < BOS else {BOS: b"<bos>", EOS: b"<eos>"}.get(token, b"")

    def is_special(self, token: int) -> bool:
        return token >= BOS

    def detokenizer(self) -> StreamingDetokenizer:
        return StreamingDetokenizer(self.piece)

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text, add_bos=True) for text in texts]


class SlowCompiler(GrammarCompiler):
    """Whatever it compiles waits until it may go on."""

    PATIENCE_S = 60

    def __init__(self) -> None:
        super().__init__(ByteTokenizer(), VOCABULARY)
        self.begun = 0
        self.let_go = threading.Event()

    def read(self, grammar: Grammar, *, spaced: bool = False) -> Callable[[], Compiled]:
        rest = super().read(grammar, spaced=spaced)

        def waiting() -> Compiled:
            self.begun += 1
            assert self.let_go.wait(self.PATIENCE_S), "nobody let the compiler go on"
            return rest()

        return waiting
