"""Text to token ids and back, by the files a checkpoint brings.

Owns the reading of `tokenizer.json` and of the files beside it that say which tokens begin and end a text; no other
module knows BOS and end-of-turn rules. Knows nothing of prompts, messages or requests, and keeps no global state.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers

from models.checkpoint import Checkpoint
from models.decoding import Decoding
from models.detokenizer import StreamingDetokenizer
from models.errors import TokenizerError
from models.special_tokens import END_OF_TURN

_log = logging.getLogger(__name__)


class Tokenizer:
    """A vocabulary. Thread: any, several at once; touches no MLX."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        prefix: tuple[int, ...],
        stop_ids: frozenset[int],
        eos_token: str | None,
        chat_template: str | None,
        pad_id: int | None = None,
        suffix: tuple[int, ...] = (),
    ) -> None:
        """Wrap `backend`; `load_tokenizer` finds the rest.

        Args:
            backend: The vocabulary.
            bos_id: The token that begins a text, whether or not a prompt is to begin with it.
            prefix: What a prompt begins with: BOS, for some models more, or nothing.
            stop_ids: Tokens after which the model has nothing more to say.
            eos_token: The text of the token that ends a text, for chat templates.
            chat_template: A Jinja template, or None.
            pad_id: The token that fills texts up to one length, or None.
            suffix: What a whole text, not a prompt, ends with where its settings say so: EOS.
        """
        self._backend = backend
        self._prefix = prefix
        self._suffix = suffix
        added = backend.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self._special = frozenset(index for index, token in added.items() if token.special)
        self._decoding = Decoding.of(backend)
        self._pieces: dict[int, bytes] = {}
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(self._added, default=-1) + 1)
        self.bos_id = bos_id
        self.stop_ids = stop_ids
        self.eos_token = eos_token
        self.chat_template = chat_template
        self.pad_id = pad_id

    @property
    def adds_bos(self) -> bool:
        """Whether the model wants its prompts to begin with BOS."""
        return bool(self._prefix)

    @property
    def bos_token(self) -> str | None:
        """The text of BOS, for chat templates."""
        return None if self.bos_id is None else self._backend.id_to_token(self.bos_id)

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Token ids of `text`; special tokens written out in it become those tokens.

        Args:
            text: Any Unicode text.
            add_bos: Begin with BOS if the model wants it and the text does not itself begin with it.

        Raises:
            TokenizerError: `text` holds a lone surrogate.
        """
        try:
            # A batch of one: unlike `encode` it lets other threads run meanwhile, and keeps no offsets.
            ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as error:
            raise TokenizerError("the text holds half of a surrogate pair, which is no character") from error
        if add_bos and tuple(ids[: len(self._prefix)]) != self._prefix:
            return [*self._prefix, *ids]
        return ids

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, with what the model wants around them. Raises TokenizerError as `encode` does."""
        try:
            found = [each.ids for each in self._backend.encode_batch_fast(list(texts), add_special_tokens=True)]
        except TypeError as error:
            raise TokenizerError("the text holds half of a surrogate pair, which is no character") from error
        return [self._dressed(ids) for ids in found]

    def _dressed(self, ids: list[int]) -> list[int]:
        """The same with a beginning and an end that the settings ask for and the vocabulary does not put there."""
        if tuple(ids[: len(self._prefix)]) != self._prefix:
            ids = [*self._prefix, *ids]
        if self._suffix and tuple(ids[-len(self._suffix) :]) != self._suffix:
            ids = [*ids, *self._suffix]
        return ids

    def fewest_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, found without encoding it.

        Encoding takes some 200 bytes of memory per character: a text that is hopelessly long had better be refused
        before. A text that the vocabulary mostly ignores may have fewer; there is none of that length in earnest.
        """
        return len(text) // self._longest_piece

    @cached_property
    def _longest_piece(self) -> int:
        return max(len(self.piece(token)) for token in range(self.vocab_size)) or 1

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for, perhaps not whole characters; empty for an id outside the vocabulary."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._make_piece(token)
        return found

    def is_special(self, token: int) -> bool:
        """Whether the token steers the model rather than being text."""
        return token in self._special

    def detokenizer(self, *, skip_special: bool = False, at_start: bool = False) -> StreamingDetokenizer:
        """A fresh detokenizer.

        The defaults are those of a continued prompt in Ollama's runners: special tokens are visible, because a parent
        recognises thoughts and tool calls by them, and a leading space is part of the answer.

        Args:
            skip_special: Leave special tokens out of the text.
            at_start: The sequence is a whole text and not a continuation: drop the space SentencePiece put before it.
        """
        piece = self._plain_piece if skip_special else self.piece
        return StreamingDetokenizer(piece, strip_space=at_start and self._decoding.strips_space)

    def _plain_piece(self, token: int) -> bytes:
        return b"" if token in self._special else self.piece(token)

    def _make_piece(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        added = self._added.get(token)
        if added is not None:
            return self._decoding.replaced(added)
        text = self._backend.id_to_token(token)
        return b"" if text is None else self._decoding.plain(text)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        TokenizerError: it has none, or one of its files cannot be read.
    """
    raw = _read(checkpoint, "tokenizer.json")
    if raw is None:
        raise TokenizerError(
            f"{checkpoint.reference} has no tokenizer.json; a vocabulary in tokenizer.model or vocab.json must be "
            "converted first (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    try:
        backend = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises no type more precise than this for a bad file
        raise TokenizerError(f"{checkpoint.reference}: tokenizer.json: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    settings = _Settings.of(checkpoint)
    _add_late_tokens(backend, settings)
    bos_id = settings.bos_id(backend)
    prefix = _prefix(backend, settings, bos_id)
    if bos_id is None and len(prefix) == 1:
        bos_id = prefix[0]
    pad = settings.token("pad_token")
    return Tokenizer(
        backend,
        bos_id=bos_id,
        prefix=prefix,
        stop_ids=_stop_ids(backend, settings),
        eos_token=settings.token("eos_token"),
        chat_template=_chat_template(checkpoint, settings),
        pad_id=None if pad is None else backend.token_to_id(pad),
        suffix=_suffix(backend, settings),
    )


@dataclass(frozen=True, slots=True)
class _Settings:
    """The files beside the vocabulary, parsed; a missing one is empty."""

    tokenizer: Mapping[str, object]
    special: Mapping[str, object]
    generation: Mapping[str, object]
    config: Mapping[str, object]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_Settings":
        return cls(
            tokenizer=_read_object(checkpoint, "tokenizer_config.json"),
            special=_read_object(checkpoint, "special_tokens_map.json"),
            generation=_read_object(checkpoint, "generation_config.json"),
            config=checkpoint.config,
        )

    def token(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token`, `pad_token`: a string, or an object that has it as `content`."""
        for source in (self.tokenizer, self.special):
            match source.get(name):
                case str(text) | {"content": str(text)} if text:
                    return text
        return None

    def ids(self, name: str) -> Iterator[list[int]]:
        """The ids under `bos_token_id`, `eos_token_id` of each file that has them, the most particular file first."""
        text_config = self.config.get("text_config")
        for source in (self.generation, self.config, text_config if isinstance(text_config, dict) else {}):
            value = source.get(name)
            values = value if isinstance(value, list) else [value]
            found = [item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
            if found:
                yield found

    def bos_id(self, backend: tokenizers.Tokenizer) -> int | None:
        """BOS, by its text where one is given: some checkpoints carry their base model's id in `config.json`."""
        text = self.token("bos_token")
        index = None if text is None else backend.token_to_id(text)
        if index is not None:
            return index
        return next((ids[0] for ids in self.ids("bos_token_id")), None)


def _add_late_tokens(backend: tokenizers.Tokenizer, settings: _Settings) -> None:
    """Add the tokens that `tokenizer_config.json` alone knows of, as fine-tuned models have them."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = settings.tokenizer.get("added_tokens_decoder")
    late = {
        int(index): item
        for index, item in (listed.items() if isinstance(listed, dict) else ())
        if index.isascii() and index.isdigit() and isinstance(item, dict) and item.get("content") not in known
    }
    for index, item in sorted(late.items()):
        text = item.get("content")
        if not isinstance(text, str) or not text:
            continue
        place = backend.token_to_id(text)
        if index != (backend.get_vocab_size() if place is None else place):
            _log.warning(
                "tokenizer_config.json gives %r the id %d, where the vocabulary has no room for it", text, index
            )
            continue
        flags = {name: bool(item.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([tokenizers.AddedToken(text, **flags)])


def _prefix(backend: tokenizers.Tokenizer, settings: _Settings, bos_id: int | None) -> tuple[int, ...]:
    """What a prompt begins with: as `add_bos_token` says, else what the vocabulary's own post-processor puts there."""
    flag = settings.tokenizer.get("add_bos_token")
    if flag is False:
        return ()
    if flag is True and bos_id is not None:
        return (bos_id,)
    plain = backend.encode("a", add_special_tokens=False).ids
    dressed = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return tuple(dressed[:start])
    return ()


def _suffix(backend: tokenizers.Tokenizer, settings: _Settings) -> tuple[int, ...]:
    """EOS where `add_eos_token` says so: what a vocabulary's own post-processor appends is not told here."""
    eos = settings.token("eos_token") if settings.tokenizer.get("add_eos_token") is True else None
    index = None if eos is None else backend.token_to_id(eos)
    return () if index is None else (index,)


def _stop_ids(backend: tokenizers.Tokenizer, settings: _Settings) -> frozenset[int]:
    """Everything any file calls the end, and the well-known ends of a turn among the added tokens."""
    stops = {index for ids in settings.ids("eos_token_id") for index in ids}
    eos = settings.token("eos_token")
    if eos is not None and (index := backend.token_to_id(eos)) is not None:
        stops.add(index)
    added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    known = {text: added[text] for text in END_OF_TURN if text in added}
    if "<|return|>" in known and "<|call|>" in known:
        # In the harmony format <|end|> closes one message of several in a turn.
        harmony_end = known.pop("<|end|>", None)
        stops.discard(-1 if harmony_end is None else harmony_end)
    return frozenset(stops | set(known.values()))


def _chat_template(checkpoint: Checkpoint, settings: _Settings) -> str | None:
    """The template: in the tokenizer's settings, alone or as the default among several, or in a file of its own."""
    own = _read(checkpoint, "chat_template.jinja")
    if own is not None:
        return _text(own, "chat_template.jinja")
    sources: tuple[Callable[[], object], ...] = (
        lambda: _read_object(checkpoint, "chat_template.json").get("chat_template"),
        lambda: settings.tokenizer.get("chat_template"),
    )
    for source in sources:
        match source():
            case str(template):
                return template
            case list(variants):
                named = {item.get("name"): item.get("template") for item in variants if isinstance(item, dict)}
                if isinstance(default := named.get("default"), str):
                    return default
    return None


def _read(checkpoint: Checkpoint, name: str) -> bytes | None:
    """A file of the tokenizer: beside the weights, or in the folder that some stores keep it in."""
    found = checkpoint.read(name)
    return checkpoint.read(f"tokenizer/{name}") if found is None else found


def _read_object(checkpoint: Checkpoint, name: str) -> Mapping[str, object]:
    raw = _read(checkpoint, name)
    if raw is None:
        return {}
    try:
        value = json.loads(_text(raw, name))
    except ValueError as error:
        raise TokenizerError(f"{checkpoint.reference}: {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{checkpoint.reference}: {name} is not a JSON object")
    return value


def _text(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{name} is not UTF-8: {error}") from error
