"""WordPiece and Unigram rebuilt from GGUF metadata, as llama.cpp's and Ollama's converters write it."""

import base64
import json

import pytest

from models.errors import TokenizerError
from models.sources.gguf_tokenizer import tokenizer_files
from models.tokenizer import load_tokenizer
from tests.models.sources.conftest import Files

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2581the", "\u2581fox", "es", "\u2581b", "\u2581\u4e16", "\u2581,"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "\u2581the", "\u2581fo", "x", "es"]


def load(metadata):
    return load_tokenizer(Files(tokenizer_files(metadata)))


def wordpiece(tokens=WORDS, controls=4, **more):
    return {
        "general.architecture": "bert",
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [3 if n < controls else 1 for n in range(len(tokens))],
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def unigram(**more):
    return {
        "general.architecture": "bert",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": list(PIECES),
        "tokenizer.ggml.scores": [0.0] * 4 + [-float(n) for n in range(2, 7)],
        "tokenizer.ggml.token_type": [3, 3, 3, 2, 1, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def test_words_and_what_goes_on_are_told_apart_by_the_visible_space():
    tokenizer = load(wordpiece())
    assert tokenizer.encode_whole(["The FOXES, b\u4e16 dog"]) == [[2, 4, 5, 6, 9, 7, 8, 1, 3]]
    assert tokenizer.encode_whole([""]) == [[2, 3]]


def test_brackets_that_ollamas_converter_leaves_alone_are_special_whatever_their_type():
    tokenizer = load(wordpiece(controls=0))
    assert tokenizer.encode_whole(["fox"]) == [[2, 5, 3]]


def test_ends_of_other_names_are_found_by_their_ids():
    tokens = ["<s>", "<unk>", "</s>", "\u2581fox"]
    tokenizer = load(wordpiece(tokens, 3, bos_token_id=0, unknown_token_id=1, seperator_token_id=2))
    assert tokenizer.encode_whole(["fox dog"]) == [[0, 3, 1, 2]]


def test_a_vocabulary_with_a_capital_letter_is_cased():
    tokenizer = load(wordpiece([*WORDS, "\u2581Fox"]))
    assert tokenizer.encode_whole(["Fox fox"]) == [[2, 10, 5, 3]]


def test_accents_go_where_case_goes():
    assert load(wordpiece()).encode_whole(["th\u00e9"]) == [[2, 4, 3]]
    assert load(wordpiece([*WORDS, "\u2581Fox"])).encode_whole(["th\u00e9"]) == [[2, 1, 3]]


def test_unigram_pieces_have_their_ends():
    tokenizer = load(unigram())
    assert tokenizer.encode_whole(["the  foxes"]) == [[0, 5, 6, 7, 8, 2]]


def test_unigram_ends_are_left_out_where_the_file_says_so():
    assert load(unigram(add_bos_token=False)).encode_whole(["the"]) == [[5, 2]]
    assert load(unigram(add_eos_token=False)).encode_whole(["the"]) == [[0, 5]]


def test_a_map_of_characters_reaches_the_normalizer_as_it_is():
    files = tokenizer_files(unigram(precompiled_charsmap=[1, -1, 255]))
    normalizer = json.loads(files["tokenizer.json"])["normalizer"]
    assert base64.b64decode(normalizer["precompiled_charsmap"]) == b"\x01\xff\xff"


def test_unigram_without_scores_is_refused():
    with pytest.raises(TokenizerError, match="9 tokens, but 0 scores"):
        load(unigram() | {"tokenizer.ggml.scores": []})
