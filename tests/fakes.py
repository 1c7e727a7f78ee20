"""Stand-ins that do real work on real MLX arrays: a language model in miniature and a vocabulary of bytes.

The model's hidden state of a token depends on every token before it by exact integer arithmetic in the cache, so
chunking, company, a wrong offset or a mixed-up row all show in what it says.
"""

import asyncio
import copy
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Self

import mlx.core as mx

from models.cache import Segment
from models.detokenizer import StreamingDetokenizer
from models.errors import TokenizerError
from models.llm.base import Row

BOS = 256
EOS = 257
VOCABULARY = 258
SCRIPT = 0x10
"""A byte SCRIPT + k in a prompt makes the model say script k from there on, then EOS."""
POISON = 0x0E
"""After this byte the logits are NaN."""

_MODULUS = 1009
_NO_SCRIPT = -1


class FakeCache:
    """What the model remembers of a row: all of its tokens. Raises if it is driven in a way no cache allows."""

    def __init__(self) -> None:
        self.offset = 0
        self.tokens = mx.zeros((0,), dtype=mx.int32)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def arrays(self) -> list[mx.array]:
        return [self.tokens]

    def append(self, tokens: mx.array) -> mx.array:
        assert self.tokens.shape[0] == self.offset, "the offset is not the number of tokens"
        self.offset += tokens.shape[0]
        self.tokens = mx.concatenate([self.tokens, tokens])
        return self.tokens

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        raise AssertionError("the fake model has no keys")

    def snapshot(self) -> Self:
        return copy.copy(self)

    @property
    def first(self) -> int:
        return 0

    def segment(self, begin: int, end: int) -> Segment:
        tokens = self.tokens[begin:end].reshape(1, 1, -1, 1)
        return Segment((tokens, tokens)).part(0, end - begin)

    def restore(self, segments: Sequence[Segment]) -> None:
        assert self.offset == 0, "only an empty cache is restored"
        for segment in segments:
            self.append(segment.arrays[0].reshape(-1))

    def trim(self, tokens: int) -> None:
        self.offset -= tokens
        self.tokens = self.tokens[: self.offset]


class FakeModel:
    """A LanguageModel whose next token is a function of all tokens so far, or a script's next byte.

    `before_step(number, rows)` is called at the beginning of each forward pass, in the thread that runs it: it may
    raise, wait, or take notes. Numbers count from 0.
    """

    vocab_size = VOCABULARY
    num_layers = 1

    def __init__(
        self,
        *scripts: str | bytes,
        context_length: int = 4096,
        before_step: Callable[[int, Sequence[Row]], None] | None = None,
    ) -> None:
        self.context_length = context_length
        self.computes_when_called = False
        self.steps = 0
        self.before_step = before_step
        self._caches: weakref.WeakSet[FakeCache] = weakref.WeakSet()
        encoded = [script.encode() if isinstance(script, str) else script for script in scripts]
        self.longest = max(map(len, encoded), default=0) + 1
        self._scripts = [[*script, *[EOS] * (self.longest - len(script))] for script in encoded] or [[EOS]]

    def __call__(self, tokens: mx.array, rows: Sequence[Row]) -> mx.array:
        assert tokens.dtype == mx.int32
        assert tokens.shape == (sum(row.length for row in rows),)
        assert len({id(row.cache[0]) for row in rows}) == len(rows), "a row is twice in the batch"
        number, self.steps = self.steps, self.steps + 1
        if self.before_step is not None:
            self.before_step(number, rows)
        begin, hidden = 0, []
        for row in rows:
            (cache,) = row.cache
            assert isinstance(cache, FakeCache)
            all_tokens = cache.append(tokens[begin : begin + row.length])
            hidden.append(_hidden(all_tokens)[-row.length :])
            begin += row.length
        return mx.concatenate(hidden)

    def logits(self, hidden: mx.array) -> mx.array:
        digest, last, script, place = (hidden[:, index : index + 1] for index in range(4))
        ids = mx.arange(VOCABULARY)
        free = 6 * mx.sin(digest * 0.37 + ids * (1.3 + (digest % 7)))
        # The end of a text is rare, but it comes.
        free = mx.where(ids == EOS, free - 4, free)
        forbidden = (ids == BOS) | (ids == POISON) | ((ids >= SCRIPT) & (ids < SCRIPT + 16))
        free = mx.where(forbidden, -mx.inf, free)
        table = mx.array(self._scripts)
        script_id = mx.clip(script.astype(mx.int32), 0, len(self._scripts) - 1)
        said = table[script_id, mx.clip(place.astype(mx.int32), 0, self.longest - 1)]
        scripted = mx.where(ids == said, 60.0, 0.0) + 0.01 * mx.sin(ids * 1.0)
        logits = mx.where(script >= 0, scripted, free)
        return mx.where(last == POISON, mx.nan, logits).astype(mx.float32)

    def new_cache(self) -> list[FakeCache]:
        cache = FakeCache()
        self._caches.add(cache)
        return [cache]

    def living_caches(self) -> int:
        """How many rows' caches something still refers to."""
        gc.collect()
        return len(self._caches)

    def cache_nbytes(self, tokens: int) -> int:
        return 4 * tokens


def _hidden(tokens: mx.array) -> mx.array:
    """Shapes: (S,) to (S, 4): a digest of the tokens so far, the last one, the script and the place in it."""
    places = mx.arange(tokens.shape[0])
    digest = mx.cumsum((tokens + 1) * (places % 31 + 1) * 17) % _MODULUS
    is_script = (tokens >= SCRIPT) & (tokens < SCRIPT + 16)
    code = mx.cummax(mx.where(is_script, places * 16 + (tokens - SCRIPT), _NO_SCRIPT))
    script = mx.where(code >= 0, code % 16, _NO_SCRIPT)
    place = mx.where(code >= 0, places - code // 16, 0)
    return mx.stack([digest, tokens, script, place], axis=-1).astype(mx.float32)


class Gate:
    """A `before_step` that holds the model up at one step until it is opened."""

    PATIENCE_S = 30

    def __init__(self, step: int) -> None:
        self._step = step
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, number: int, rows: Sequence[Row]) -> None:
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

    def detokenizer(self) -> StreamingDetokenizer:
        return StreamingDetokenizer(self.piece)
