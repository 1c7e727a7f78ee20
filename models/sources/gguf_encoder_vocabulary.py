"""The vocabularies that encoders' GGUF files hold, as the body of a `tokenizer.json`: WordPiece and Unigram.

Converters write WordPiece with the sense of its marks reversed: what begins a word has a visible space before it, what
goes on has lost its "##". Where llama.cpp and Hugging Face cut a text differently, Hugging Face is followed.

Source: llama.cpp convert_hf_to_gguf.py, BertModel and XLMRobertaModel, and src/llama-vocab.cpp; ollama v0.24.0
convert/convert_bert.go; the `tokenizers` library's file format.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

SPACE = "\u2581"
_CONTINUED = "##"


@dataclass(frozen=True, slots=True)
class Ends:
    """The texts of the tokens around a text and of the one for what is unknown; None: there is none."""

    first: str | None
    last: str | None
    unknown: str | None


def wordpiece_tokens(tokens: Sequence[str], special: Sequence[bool]) -> list[str]:
    """The tokens as WordPiece has them."""
    return [
        token if is_special or _is_bracketed(token) else _unmarked(token)
        for token, is_special in zip(tokens, special, strict=True)
    ]


def _is_bracketed(token: str) -> bool:
    """Ollama's converter marks none of these, whatever their type."""
    return len(token) > 2 and token.startswith("[") and token.endswith("]")


def _unmarked(token: str) -> str:
    return token[1:] if token.startswith(SPACE) else _CONTINUED + token


def wordpiece(tokens: Sequence[str], ends: Ends) -> dict[str, object]:
    """The body for a WordPiece vocabulary. It is cased if any of its tokens has a capital letter."""
    words = [token for token in tokens if not _is_bracketed(token) and token not in (ends.first, ends.last)]
    is_cased = any(word != word.lower() for word in words if word != ends.unknown)
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": not is_cased,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template(tokens, ends),
        "decoder": {"type": "WordPiece", "prefix": _CONTINUED, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": ends.unknown or "[UNK]",
            "continuing_subword_prefix": _CONTINUED,
            "max_input_chars_per_word": 100,
            "vocab": {token: index for index, token in enumerate(tokens)},
        },
    }


def unigram(
    tokens: Sequence[str], scores: Sequence[float], ends: Ends, *, charsmap: bytes, space_prefix: bool
) -> dict[str, object]:
    """The body for a Unigram vocabulary, whose texts are first rewritten as `charsmap` says, if it says anything."""
    normalizer = None
    if charsmap:
        normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")}
    scheme = "always" if space_prefix else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": template(tokens, ends),
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": None if ends.unknown is None else tokens.index(ends.unknown),
            "vocab": list(zip(tokens, scores, strict=True)),
            "byte_fallback": False,
        },
    }


def template(tokens: Sequence[str], ends: Ends) -> dict[str, object] | None:
    """What goes around a text."""
    named = [text for text in (ends.first, ends.last) if text is not None]
    if not named:
        return None

    def around(sequence: str, kind: int) -> list[dict[str, object]]:
        parts: list[dict[str, object]] = [{"Sequence": {"id": sequence, "type_id": kind}}]
        if ends.first is not None and sequence == "A":
            parts.insert(0, {"SpecialToken": {"id": ends.first, "type_id": kind}})
        if ends.last is not None:
            parts.append({"SpecialToken": {"id": ends.last, "type_id": kind}})
        return parts

    special = {text: {"id": text, "ids": [tokens.index(text)], "tokens": [text]} for text in named}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": special,
    }
