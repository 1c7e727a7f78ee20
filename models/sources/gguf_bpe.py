"""Byte-pair vocabularies of GGUF files as `tokenizer.json` has them: types of tokens, merges, and the model."""

from collections.abc import Mapping
from enum import IntEnum


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def merges_of_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges a SentencePiece BPE vocabulary implies: every way to make a piece out of two, best piece first.

    Among the ways to make one piece SentencePiece takes the leftmost in the text; a list of merges must rank them, and
    ranks the ones with the longer left part first, which comes to the same.
    """
    text_types = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    known = {token for token, kind in zip(tokens, types, strict=True) if kind in text_types}
    pieces = sorted(
        (index for index, kind in enumerate(types) if kind in text_types and len(tokens[index]) > 1),
        key=lambda index: (-scores[index], index),
    )
    return [
        (left, right)
        for piece in (tokens[index] for index in pieces)
        for cut in range(len(piece) - 1, 0, -1)
        if (left := piece[:cut]) in known and (right := piece[cut:]) in known
    ]


def bpe(
    vocabulary: Mapping[str, int],
    merges: list[tuple[str, str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, object]:
    """The `model` of a tokenizer.json."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary,
        "merges": merges,
    }
