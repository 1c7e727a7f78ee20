"""A GGUF file's vocabulary, told as the files a Hugging Face folder would hold.

Owns the translation of `tokenizer.ggml.*` into `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.
Knows nothing of how GGUF files are read: metadata comes as plain Python values. Every token keeps its id.

Source: llama.cpp, `src/llama-vocab.cpp` (meaning of the keys, defaults where a file is silent), as vendored by Ollama
v0.24.0; the `tokenizers` library's file format.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.errors import TokenizerError
from models.sources.gguf_bpe import TokenType, bpe, merges_of_scores
from models.sources.gguf_encoder_vocabulary import Ends, unigram, wordpiece, wordpiece_tokens
from models.sources.pretokenizers import FALLBACK, PRETOKENIZERS, Pretokenizer
from models.special_tokens import END_OF_TURN

_log = logging.getLogger(__name__)

_SPACE = "\u2581"


_SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL)


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What a kind of vocabulary means when the file does not say."""

    adds_bos: bool
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None


class _Metadata:
    """Typed reading of the keys; a value of the wrong type is a TokenizerError that names its key."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is None or isinstance(value, str):
            return value
        raise TokenizerError(f"{key} is not text")

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if isinstance(value, bool | int):
            return bool(value)
        raise TokenizerError(f"{key} is neither true nor false")

    def texts(self, key: str) -> list[str]:
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise TokenizerError(f"{key} is not a list of texts")
        return [str(value) for value in values]

    def integers(self, key: str) -> list[int]:
        values = self._list(key)
        if not all(isinstance(value, int) for value in values):
            raise TokenizerError(f"{key} is not a list of whole numbers")
        return [value for value in values if isinstance(value, int)]

    def numbers(self, key: str) -> list[float]:
        values = self._list(key)
        if not all(isinstance(value, int | float) for value in values):
            raise TokenizerError(f"{key} is not a list of numbers")
        return [float(value) for value in values if isinstance(value, int | float)]

    def token_id(self, key: str, count: int, default: int | None = None) -> int | None:
        """The id under `key`; `default` where it is absent or names no token, as llama.cpp has it."""
        value = self._metadata.get(key)
        if value is None:
            return default if default is not None and default < count else None
        if isinstance(value, bool) or not isinstance(value, int):
            raise TokenizerError(f"{key} is not a whole number")
        if 0 <= value < count:
            return value
        _log.warning("%s = %d names no token of a vocabulary of %d; ignored", key, value, count)
        return default

    def _list(self, key: str) -> Sequence[object]:
        value = self._metadata.get(key)
        if value is None:
            return []
        if isinstance(value, list | tuple):
            return value
        raise TokenizerError(f"{key} is not a list")


def tokenizer_files(metadata: Mapping[str, object]) -> dict[str, bytes]:
    """The files by name: `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`.

    Args:
        metadata: The GGUF file's key-value pairs as str, int, float, bool and lists of these.

    Raises:
        TokenizerError: there is no vocabulary, it contradicts itself, or it is of a kind this package does not rebuild.
    """
    source = _Metadata(metadata)
    kind = source.text("tokenizer.ggml.model")
    tokens = _unambiguous(source.texts("tokenizer.ggml.tokens"))
    if not kind or not tokens:
        raise TokenizerError("the GGUF file holds no vocabulary (tokenizer.ggml.model, tokenizer.ggml.tokens)")
    types = _types(source, tokens)
    match kind:
        case "gpt2":
            pre = _pretokenizer(source)
            defaults = _Defaults(adds_bos=pre.adds_bos)
            body = _byte_level(source, tokens, pre)
        case "llama":
            defaults = _Defaults(adds_bos=True, bos=1, eos=2, unk=0)
            body = _sentencepiece(
                source, tokens, types, source.token_id("tokenizer.ggml.unknown_token_id", len(tokens), 0)
            )
        case "bert":
            defaults = _Defaults(adds_bos=False)
            tokens = _unambiguous(wordpiece_tokens(tokens, [kind in _SPECIAL for kind in types]))
            body = wordpiece(tokens, _wordpiece_ends(source, tokens))
        case "t5":
            defaults = _Defaults(adds_bos=False)
            body = _unigram(source, tokens)
        case "gemma4":
            defaults = _Defaults(adds_bos=True)
            body = _gemma4(source, tokens, types)
        case _:
            raise TokenizerError(
                f"the GGUF file's vocabulary is of kind {kind!r}; this runner reads gpt2, llama, gemma4, bert and t5"
            )
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types, _strips_after_special(source)),
        **body,
    }
    return {
        "tokenizer.json": _encode(document),
        "tokenizer_config.json": _encode(_tokenizer_config(source, tokens, defaults)),
        "generation_config.json": _encode(_generation_config(source, tokens, defaults)),
    }


def _encode(document: object) -> bytes:
    # A damaged file may hold what is no Unicode text; it must still come out as a file.
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")


def _unambiguous(tokens: list[str]) -> list[str]:
    """Name empty, repeated and garbled tokens anew, so that every id has one text; the last of equals keeps its own."""
    last = {token: index for index, token in enumerate(tokens)}
    if len(last) == len(tokens) and "" not in last and _is_unicode("".join(tokens)):
        return tokens
    _log.warning("the vocabulary has empty, repeated or garbled tokens")
    return [
        token if token and last[token] == index and _is_unicode(token) else f"[UNUSABLE_{index}]"
        for index, token in enumerate(tokens)
    ]


def _is_unicode(text: str) -> bool:
    """Whether `text` is free of the lone surrogates by which a reader marks bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _types(source: _Metadata, tokens: list[str]) -> list[int]:
    types = source.integers("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(f"{len(tokens)} tokens, but {len(types)} token types")
    # Were these plain text, as careless conversions have it, a prompt's template would be cut into letters.
    always_control = frozenset(END_OF_TURN)
    for index in (index for index, token in enumerate(tokens) if token in always_control):
        types[index] = TokenType.CONTROL
    return types


def _pretokenizer(source: _Metadata) -> Pretokenizer:
    name = source.text("tokenizer.ggml.pre")
    if name in PRETOKENIZERS:
        return PRETOKENIZERS[name]
    _log.warning("unknown pre-tokenizer %r; a fallback is used and prompts may be cut wrongly", name)
    return FALLBACK


def _strips_after_special(source: _Metadata) -> bool:
    """Phi-3's special tokens swallow the white space after them, which no GGUF key says."""
    name = (source.text("general.name") or "").lower()
    return "phi-3" in name or "phi3" in name


def _added_tokens(tokens: list[str], types: list[int], strip_after: bool) -> list[dict[str, object]]:  # noqa: FBT001
    keep_space_after = ("<unk>", "<s>", "<|endoftext|>")
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": strip_after and tokens[index] not in keep_space_after,
            "normalized": False,
            "special": kind != TokenType.USER_DEFINED,
        }
        for index, kind in enumerate(types)
        if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
    ]


def _byte_level(source: _Metadata, tokens: list[str], pre: Pretokenizer) -> dict[str, object]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = source.texts("tokenizer.ggml.merges")
    if not merges:
        raise TokenizerError("the GGUF file's vocabulary has no merges (tokenizer.ggml.merges)")
    splits: list[dict[str, object]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"} if pre.composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": bpe(vocabulary, _known_merges(merges, vocabulary), ignore_merges=pre.whole_words),
    }


def _known_merges(merges: list[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Split each `left right`, and drop what the vocabulary cannot make, which the library would refuse."""
    pairs = (merge.partition(" ") for merge in merges)
    return [
        (left, right)
        for left, _, right in pairs
        if left in vocabulary and right in vocabulary and left + right in vocabulary
    ]


def _gemma4(source: _Metadata, tokens: list[str], types: list[int]) -> dict[str, object]:
    """Pieces like SentencePiece's and merges in an order of their own; runs of line ends are words by themselves."""
    merges = source.texts("tokenizer.ggml.merges")
    if not merges:
        raise TokenizerError("the GGUF file's vocabulary has no merges (tokenizer.ggml.merges)")
    unk = source.token_id("tokenizer.ggml.unknown_token_id", len(tokens))
    lines = {"type": "Split", "pattern": {"Regex": "\\n+"}, "behavior": "Isolated", "invert": False}
    return _sentencepiece(source, tokens, types, unk, ranked=merges) | {"pre_tokenizer": lines}


def _sentencepiece(
    source: _Metadata, tokens: list[str], types: list[int], unk: int | None, *, ranked: list[str] | None = None
) -> dict[str, object]:
    """What is said of a SentencePiece vocabulary; `ranked` are its merges, where scores do not imply them."""
    scores = source.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise TokenizerError(f"{len(tokens)} tokens, but {len(scores)} scores (tokenizer.ggml.scores)")
    # Gemma was trained without, and not every converter says so.
    is_gemma = (source.text("general.architecture") or "").startswith("gemma")
    prefix = source.flag("tokenizer.ggml.add_space_prefix", default=not is_gemma)
    for index, kind in enumerate(types):
        if kind == TokenType.USER_DEFINED:
            # These are sought in the text as it was written, before its spaces are marked.
            tokens[index] = tokens[index].replace(_SPACE, " ")
    tokens[:] = _unambiguous(tokens)
    normalizers: list[dict[str, object]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = merges_of_scores(tokens, types, scores) if ranked is None else _known_merges(ranked, vocabulary)
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe(
            vocabulary, merges, unk_token=None if unk is None else tokens[unk], byte_fallback=TokenType.BYTE in types
        ),
    }


def _wordpiece_ends(source: _Metadata, tokens: list[str]) -> Ends:
    """BERT's own texts, unless the file names other tokens; Ollama's converter names but some."""

    def named(text: str, *keys: str) -> str | None:
        found = (source.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens)) for key in keys)
        index = next((each for each in found if each is not None), None)
        return text if text in tokens else None if index is None else tokens[index]

    # "seperator" is how the format spells it.
    return Ends(
        named("[CLS]", "cls", "bos"), named("[SEP]", "seperator", "separator", "eos"), named("[UNK]", "unknown")
    )


def _unigram(source: _Metadata, tokens: list[str]) -> dict[str, object]:
    scores = source.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise TokenizerError(f"{len(tokens)} tokens, but {len(scores)} scores (tokenizer.ggml.scores)")

    def named(key: str, *, default: bool = True) -> str | None:
        index = source.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens))
        wanted = source.flag(f"tokenizer.ggml.add_{key}_token", default=default)
        return tokens[index] if index is not None and wanted else None

    unknown = source.token_id("tokenizer.ggml.unknown_token_id", len(tokens))
    is_encoder = source.text("general.architecture") == "bert"
    return unigram(
        tokens,
        scores,
        Ends(named("bos", default=is_encoder), named("eos"), None if unknown is None else tokens[unknown]),
        charsmap=bytes(value & 0xFF for value in source.integers("tokenizer.ggml.precompiled_charsmap")),
        space_prefix=source.flag("tokenizer.ggml.add_space_prefix", default=True),
    )


def _tokenizer_config(source: _Metadata, tokens: list[str], defaults: _Defaults) -> dict[str, object]:
    ids = {
        "bos_token": source.token_id("tokenizer.ggml.bos_token_id", len(tokens), defaults.bos),
        "eos_token": source.token_id("tokenizer.ggml.eos_token_id", len(tokens), defaults.eos),
        "unk_token": source.token_id("tokenizer.ggml.unknown_token_id", len(tokens), defaults.unk),
        "pad_token": source.token_id("tokenizer.ggml.padding_token_id", len(tokens)),
    }
    config: dict[str, object] = {name: tokens[index] for name, index in ids.items() if index is not None}
    config["add_bos_token"] = source.flag("tokenizer.ggml.add_bos_token", default=defaults.adds_bos)
    config["add_eos_token"] = source.flag("tokenizer.ggml.add_eos_token", default=False)
    template = source.text("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def _generation_config(source: _Metadata, tokens: list[str], defaults: _Defaults) -> dict[str, object]:
    count = len(tokens)
    stops = [
        source.token_id("tokenizer.ggml.eos_token_id", count, defaults.eos),
        *(stop for stop in source.integers("tokenizer.ggml.eos_token_ids") if 0 <= stop < count),
        source.token_id("tokenizer.ggml.eot_token_id", count),
        source.token_id("tokenizer.ggml.eom_token_id", count),
    ]
    config: dict[str, object] = {"eos_token_id": list(dict.fromkeys(stop for stop in stops if stop is not None))}
    bos = source.token_id("tokenizer.ggml.bos_token_id", count, defaults.bos)
    if bos is not None:
        config["bos_token_id"] = bos
    if suppressed := source.integers("tokenizer.ggml.suppress_tokens"):
        config["suppress_tokens"] = suppressed
    return config
