"""Grammars compiled for one vocabulary, and the last of them kept.

Strict first: a schema that the engine can express is enforced whole. One that it cannot is enforced without the
keywords that it names, unless that is not wanted.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from models.errors import GrammarError
from models.grammar.formats import GBNF, Grammar, JSONSchema
from models.grammar.matcher import Matcher, reason_of
from models.grammar.schema import Schema, check_size, narrowed, parsed
from models.grammar.vocabulary import Pieces, engine_vocabulary

KEPT, KEPT_CHARACTERS = 64, 1 << 21
"""Grammars, and what their texts may have in all: compiled, a text takes some fifty times its size."""
SPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""White space between the tokens of JSON. Weak models would never come to an end of it."""

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar for a vocabulary. Thread: any."""

    ignored: tuple[str, ...]
    """What of it is not enforced, in the engine's words."""
    _pristine: LLMatcher
    _tokenizer: LLTokenizer
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def matcher(self) -> Matcher:
        """A new one, at the beginning of an answer."""
        with self._lock:
            return Matcher(self._pristine.deep_copy())

    def tokens(self, text: bytes) -> list[int] | None:
        """Some tokens that stand for these bytes; None if they end within a character."""
        try:
            return self._tokenizer.greedy_tokenize(text.decode())
        except UnicodeDecodeError:
            return None

    def admits(self, text: bytes) -> bool:
        """Whether an answer may begin with these bytes; not if they end within a character."""
        tokens = self.tokens(text)
        with self._lock:
            return tokens is not None and self._pristine.validate_tokens(tokens) == len(tokens)


@dataclass(frozen=True, slots=True)
class _Attempt:
    schema: Schema
    lenient: bool


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Thread: any, several at once; lets others run meanwhile."""

    def __init__(self, pieces: Pieces, width: int, *, strict: bool = False) -> None:
        """For the tokens of `width` logits; if `strict`, what cannot be enforced whole is refused."""
        self._pieces, self._width, self._strict = pieces, width, strict
        self._kept: OrderedDict[tuple[Grammar, bool], Compiled] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar, *, spaced: bool = False) -> Compiled:
        """The grammar, perhaps one that was compiled before; if `spaced`, white space may come before it.

        Raises:
            GrammarError: it cannot be enforced; the message says why.
        """
        return self.kept(grammar, spaced=spaced) or self.read(grammar, spaced=spaced)()

    def kept(self, grammar: Grammar, *, spaced: bool = False) -> Compiled | None:
        """The grammar if it was compiled before and is kept."""
        key = (grammar, spaced)
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
            return found

    def read(self, grammar: Grammar, *, spaced: bool = False) -> Callable[[], Compiled]:
        """Read it as far as that takes no time to speak of; what is returned does the rest, and keeps the grammar.

        Raises:
            GrammarError: it is none, or larger or deeper than a request may bring. What is returned raises it as well,
                where the engine cannot do with the grammar.
        """
        match grammar:
            case GBNF(text):
                check_size(text, "grammar")
                build = partial(self._of_gbnf, text)
            case JSONSchema(text):
                build = partial(self._of_schema, parsed(text), spaced=spaced)
        return partial(self._keep, (grammar, spaced), build)

    def _keep(self, key: tuple[Grammar, bool], build: Callable[[], Compiled]) -> Compiled:
        compiled = build()
        with self._lock:
            self._kept[key] = compiled
            while len(self._kept) > KEPT or sum(len(each.text) for each, _ in self._kept) > KEPT_CHARACTERS:
                self._kept.popitem(last=False)
        return compiled

    def warm(self) -> LLTokenizer:
        """The vocabulary in the engine's form, made when it is asked for first: in up to a second, all others waiting.

        Who never asks for a format is spared its memory (some 25 MiB for 49,152 tokens).
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = engine_vocabulary(self._pieces, self._width)
            return self._tokenizer

    def _of_gbnf(self, text: str) -> Compiled:
        return self._built(_lark_of_gbnf(text))

    def _of_schema(self, schema: Schema, *, spaced: bool) -> Compiled:
        reason = ""
        for attempt in self._attempts(schema):
            try:
                return self._built(_lark_of_schema(attempt, spaced=spaced))
            except GrammarError as error:
                # The last attempt is at the schema as it came.
                reason = str(error)
        raise GrammarError(reason)

    def _attempts(self, schema: Schema) -> Iterator[_Attempt]:
        narrow = narrowed(schema)
        for lenient in (False,) if self._strict else (False, True):
            if narrow is not schema:
                yield _Attempt(narrow, lenient)
            yield _Attempt(schema, lenient)

    def _built(self, lark: str) -> Compiled:
        tokenizer = self.warm()
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
        if not matcher.is_error():
            # The first mask may find out more, for one that nothing may follow.
            matcher.compute_bitmask()
        if matcher.is_stopped():
            reason = reason_of(matcher.get_error())
            empty = not reason or reason.startswith("NoExtension")
            raise GrammarError("it describes no answer, as a $ref does that leads back to itself" if empty else reason)
        return Compiled(tuple(matcher.get_grammar_warnings()), matcher, tokenizer)


def _lark_of_schema(attempt: _Attempt, *, spaced: bool) -> str:
    """The engine's own language, for a schema with the engine's options in it."""
    options: Schema = {"whitespace_pattern": SPACE, "lenient": attempt.lenient, "coerce_one_of": attempt.lenient}
    text = json.dumps(attempt.schema | {"x-guidance": options}, ensure_ascii=False)
    return f"start: SPACE? json\nSPACE: /{SPACE}/\njson: %json {text}" if spaced else f"start: %json {text}"


def _lark_of_gbnf(text: str) -> str:
    try:
        return gbnf_to_lark(_ESCAPE.sub(_unescaped, text))
    except Exception as error:
        # The translator raises no type more precise than this for a bad grammar.
        raise GrammarError(reason_of(str(error)) or type(error).__name__) from error


def _unescaped(escape: re.Match[str]) -> str:
    """The character itself, or its escape in two digits, instead of one that the translator garbles."""
    if (digits := escape[1] or escape[2]) is None:
        return escape[0]
    code = int(digits, 16)
    if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
        raise GrammarError(f"{escape[0]} is no character")
    return chr(code) if code >= 0x80 else f"\\x{code:02x}"
