"""Vocabularies rebuilt from GGUF metadata, against ids that the reference libraries gave (fixtures/tokenizers)."""

import itertools
import json
import logging
import random
import time
import unicodedata
from pathlib import Path

import pytest

from models.chat_template import render_chat
from models.checkpoint import open_checkpoint
from models.errors import TokenizerError
from models.sources.gguf_tokenizer import tokenizer_files
from models.sources.pretokenizers import PRETOKENIZERS
from models.tokenizer import Tokenizer, load_tokenizer
from tests.models.sources.conftest import Files

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers"
REFERENCE = json.loads((FIXTURES / "reference.json").read_text())
BYTE_LEVEL = json.loads((FIXTURES / "byte_level.json").read_text())
SENTENCEPIECE = json.loads((FIXTURES / "sentencepiece.json").read_text())
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER = ("<tool_call>", "</tool_call>")
BYTE_LEVEL_KINDS = [name for name in REFERENCE["ids"] if name not in SENTENCEPIECE]


def byte_level_metadata(pre: str, **more: object) -> dict[str, object]:
    types = {**dict.fromkeys(CONTROL, 3), **dict.fromkeys(USER, 4)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(BYTE_LEVEL["tokens"]),
        "tokenizer.ggml.token_type": [types.get(token, 1) for token in BYTE_LEVEL["tokens"]],
        "tokenizer.ggml.merges": list(BYTE_LEVEL["merges"]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def sentencepiece_metadata(name: str, **more: object) -> dict[str, object]:
    rows = SENTENCEPIECE[name]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [row[0] for row in rows],
        "tokenizer.ggml.scores": [row[1] for row in rows],
        "tokenizer.ggml.token_type": [row[2] for row in rows],
        "tokenizer.ggml.add_space_prefix": name != "gemma",
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def load(metadata: dict[str, object]) -> Tokenizer:
    return load_tokenizer(Files(tokenizer_files(metadata)))


def assert_same_ids(tokenizer: Tokenizer, texts: list[str], ids: list[list[int]]) -> None:
    wrong = [
        (text, tokenizer.encode(text, add_bos=False), expected)
        for text, expected in zip(texts, ids, strict=True)
        if tokenizer.encode(text, add_bos=False) != expected
    ]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:3]}"


@pytest.mark.parametrize("pre", BYTE_LEVEL_KINDS)
def test_a_byte_level_vocabulary_gives_the_reference_ids(pre):
    assert_same_ids(load(byte_level_metadata(pre)), REFERENCE["texts"], REFERENCE["ids"][pre])


@pytest.mark.parametrize("pre", BYTE_LEVEL_KINDS)
def test_special_tokens_written_in_a_text_are_found(pre):
    assert_same_ids(load(byte_level_metadata(pre)), REFERENCE["special_texts"], REFERENCE["special_ids"][pre])


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece(name):
    # A text that spells out the marks of a space itself is one SentencePiece alone mistakes for spaces.
    rows = zip(REFERENCE["texts"], REFERENCE["ids"][name], strict=True)
    texts, ids = zip(*[(text, ids) for text, ids in rows if "\u2581\u2581" not in text], strict=True)
    assert_same_ids(load(sentencepiece_metadata(name)), texts, ids)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_special_tokens_written_in_a_sentencepiece_text_are_found(name):
    assert_same_ids(load(sentencepiece_metadata(name)), REFERENCE["special_texts"], REFERENCE["special_ids"][name])


def best_pair_first(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's rule, word for word: join the neighbours whose union scores best, the leftmost of equals."""
    parts = list(text)
    while True:
        found = [
            (scores[left + right], -index)
            for index, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in scores
        ]
        if not found:
            return parts
        index = -max(found)[1]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


def test_random_sentencepiece_vocabularies_join_the_best_pair_first():
    draw = random.Random(6)
    for _ in range(60):
        made = ["a", "b"]
        for _ in range(draw.randint(3, 14)):
            made.append(draw.choice(made) + draw.choice(made))
        joined = list(dict.fromkeys(piece for piece in made if 1 < len(piece) <= 8))
        draw.shuffle(joined)
        tokens = ["<unk>", "a", "b", *joined]
        scores = [0.0, -1e6, -1e6, *(-float(index) for index in range(len(joined)))]
        tokenizer = load(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.token_type": [2, *[1] * (len(tokens) - 1)],
                "tokenizer.ggml.add_space_prefix": False,
            }
        )
        rank = dict(zip(joined, scores[3:], strict=True))
        for _ in range(30):
            text = "".join(draw.choices("ab", weights=(3, 1), k=draw.randint(1, 20)))
            parts = [tokens[token] for token in tokenizer.encode(text, add_bos=False)]
            assert parts == best_pair_first(text, rank), (text, joined)


def test_a_user_defined_token_with_spaces_is_found_in_plain_text():
    metadata = sentencepiece_metadata("gemma")
    metadata["tokenizer.ggml.tokens"].append("\u2581\u2581Z\u2581")
    metadata["tokenizer.ggml.scores"].append(0.0)
    metadata["tokenizer.ggml.token_type"].append(4)
    tokenizer = load(metadata)
    last = tokenizer.vocab_size - 1
    assert tokenizer.encode("a  Z a", add_bos=False).count(last) == 1
    assert tokenizer.piece(last) == b"  Z "


def test_gemma_puts_no_space_before_a_text_even_where_the_file_is_silent():
    metadata = sentencepiece_metadata("gemma")
    del metadata["tokenizer.ggml.add_space_prefix"]
    plain = load(sentencepiece_metadata("gemma")).encode("the", add_bos=False)
    assert load(metadata | {"general.architecture": "gemma3"}).encode("the", add_bos=False) == plain
    assert load(metadata | {"general.architecture": "llama"}).encode("the", add_bos=False) != plain


GEMMA_4_PIECES = ["<unk>", "<bos>", "<eos>", "<|turn>", *(f"<0x{byte:02X}>" for byte in range(256))]
GEMMA_4_WORDS = ["a", "b", "c", "\u2581", "\n", "ab", "bc", "\u2581a", "\n\n", "a\n"]
SAID_BY_GEMMA_4 = {
    "general.architecture": "gemma4",
    "tokenizer.ggml.model": "gemma4",
    "tokenizer.ggml.tokens": GEMMA_4_PIECES + GEMMA_4_WORDS,
    # The converter writes scores too; these contradict the order of the merges.
    "tokenizer.ggml.scores": [0.0] * len(GEMMA_4_PIECES) + [float(-n) for n in range(len(GEMMA_4_WORDS))],
    "tokenizer.ggml.token_type": [2, 3, 3, 3, *[6] * 256, *[1] * len(GEMMA_4_WORDS)],
    "tokenizer.ggml.merges": ["b c", "\u2581 a", "a b", "\n \n", "a \n"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_space_prefix": False,
}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["a", "bc"]),
        (" ab", ["\u2581a", "b"]),
        ("ab", ["ab"]),
        ("a\n\nb", ["a", "\n\n", "b"]),
        ("a  b", ["a", "\u2581", "\u2581", "b"]),
        ("\u00e9", ["<0xC3>", "<0xA9>"]),
        ("<|turn>a", ["<|turn>", "a"]),
    ],
)
def test_a_gemma_4_vocabulary_merges_in_the_files_order_and_never_over_a_line_end(text: str, pieces: list[str]):
    vocabulary = SAID_BY_GEMMA_4["tokenizer.ggml.tokens"]
    assert [vocabulary[index] for index in load(SAID_BY_GEMMA_4).encode(text, add_bos=True)] == ["<bos>", *pieces]


def test_a_gemma_4_vocabulary_without_merges_is_refused():
    with pytest.raises(TokenizerError, match="no merges"):
        tokenizer_files(SAID_BY_GEMMA_4 | {"tokenizer.ggml.merges": []})


def test_without_byte_tokens_a_run_of_the_unknown_is_one_token():
    metadata = sentencepiece_metadata("llama")
    metadata["tokenizer.ggml.token_type"] = [1 if kind == 6 else kind for kind in metadata["tokenizer.ggml.token_type"]]
    tokenizer = load(metadata)
    assert tokenizer.encode("\U0010ffff\U0010fffe\U0010fffd", add_bos=False).count(0) == 1


@pytest.mark.parametrize("pre", sorted(PRETOKENIZERS))
def test_every_known_pre_tokenizer_keeps_the_whole_text(pre):
    tokenizer = load(byte_level_metadata(pre))
    text = "It's 12345 things:\n\n  日本語 HelloWorld, ½ ქართული e\u0301 👩‍👩‍👧 IMGIMGABZ <sentinel:1>\t.\r\n"
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text, add_bos=False)]
    normal = unicodedata.normalize("NFC", text) if pre in {"qwen2", "qwen35"} else text
    assert "".join(pieces) + detokenizer.finish() == normal


@pytest.mark.parametrize("name", ["of-tomorrow", None])
def test_an_unknown_pre_tokenizer_is_warned_of_and_the_fallback_serves(name, caplog):
    with caplog.at_level(logging.WARNING):
        odd = load(byte_level_metadata(name))
    assert f"unknown pre-tokenizer {name!r}" in caplog.text
    assert [odd.piece(token) for token in odd.encode("12345", add_bos=False)] == [b"12", b"3", b"4", b"5"]


def test_digits_are_cut_as_the_named_pre_tokenizer_cuts_them():
    def cuts(pre: str) -> list[bytes]:
        tokenizer = load(byte_level_metadata(pre))
        return [tokenizer.piece(token) for token in tokenizer.encode("12345", add_bos=False)]

    assert cuts("smollm") == [b"1", b"2", b"3", b"4", b"5"]
    assert cuts("llama-bpe") == [b"12", b"3", b"4", b"5"]
    assert cuts("gpt-2") == [b"12345"]


def test_the_byte_nothing_stands_for_is_left_out():
    # é is 0xc3 0xa9.
    metadata = byte_level_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"][BYTE_LEVEL["tokens"].index("\u00a9")] = "[gone]"
    tokenizer = load(metadata)
    assert [tokenizer.piece(token) for token in tokenizer.encode("z\u00e9z", add_bos=False)] == [b"z", b"\xc3", b"z"]


@pytest.mark.parametrize(
    ("metadata", "adds"),
    [
        (byte_level_metadata("llama-bpe"), True),
        (byte_level_metadata("llama-bpe", add_bos_token=False), False),
        (byte_level_metadata("qwen2"), False),
        (byte_level_metadata("qwen2", add_bos_token=True), True),
        (sentencepiece_metadata("llama"), True),
        (sentencepiece_metadata("llama", add_bos_token=False), False),
    ],
)
def test_bos_is_added_as_the_file_says_or_else_as_its_kind_does(metadata, adds):
    tokenizer = load(metadata)
    assert tokenizer.adds_bos is adds
    assert tokenizer.bos_id == 1
    assert (tokenizer.encode("a", add_bos=True)[0] == 1) is adds


def test_every_end_the_file_names_stops_a_sequence():
    metadata = byte_level_metadata("gpt-2", eot_token_id=7, eom_token_id=8, eos_token_ids=[9, 10])
    assert load(metadata).stop_ids == {0, 2, 7, 8, 9, 10}


def test_tokens_that_are_never_to_be_said_are_where_a_folder_has_them():
    def said(**values):
        return json.loads(tokenizer_files(byte_level_metadata("gpt-2", **values))["generation_config.json"])

    assert said(suppress_tokens=[7, 3])["suppress_tokens"] == [7, 3]
    assert "suppress_tokens" not in said()


def test_an_end_of_turn_of_the_wrong_type_is_still_a_control_token():
    metadata = byte_level_metadata("gpt-2")
    types = metadata["tokenizer.ggml.token_type"]
    types[2] = 1
    tokenizer = load(metadata)
    assert tokenizer.encode("a<|im_end|>", add_bos=False)[-1] == 2
    assert tokenizer.is_special(2)


def test_user_defined_tokens_are_found_but_are_text():
    tokenizer = load(byte_level_metadata("gpt-2"))
    (token,) = tokenizer.encode("<tool_call>", add_bos=False)
    assert not tokenizer.is_special(token)
    assert tokenizer.piece(token) == b"<tool_call>"


def test_the_chat_template_is_carried_over():
    metadata = byte_level_metadata("gpt-2") | {"tokenizer.chat_template": "{{ messages }}"}
    assert load(metadata).chat_template == "{{ messages }}"
    assert load(byte_level_metadata("gpt-2")).chat_template is None


def test_phi_3_swallows_the_space_after_a_special_token():
    metadata = byte_level_metadata("gpt-2") | {"general.name": "Phi-3 mini"}
    tokenizer = load(metadata)
    assert tokenizer.encode("<|im_end|>\n a", add_bos=False) == tokenizer.encode("<|im_end|>a", add_bos=False)


def test_empty_repeated_and_garbled_tokens_leave_every_other_id_in_place():
    metadata = byte_level_metadata("gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    count = len(tokens)
    tokens += ["", "a", "", "x\udcff", "y\udcff"]
    metadata["tokenizer.ggml.token_type"] += [1, 1, 1, 1, 1]
    metadata["tokenizer.chat_template"] = "broken \udcff"
    tokenizer = load(metadata)
    assert tokenizer.vocab_size == count + 5
    assert tokenizer.chat_template == "broken ?"
    assert tokenizer.encode("a", add_bos=False) == [count + 1]
    assert tokenizer.piece(tokens.index("b")) == b"b"


def test_merges_the_vocabulary_cannot_make_are_dropped():
    metadata = byte_level_metadata("gpt-2")
    metadata["tokenizer.ggml.merges"][:0] = ["Q Z", "zz qq", "", "nospace", "a \u00f6"]
    assert_same_ids(load(metadata), REFERENCE["texts"], REFERENCE["ids"]["gpt-2"])


def test_a_special_id_outside_the_vocabulary_is_ignored(caplog):
    tokenizer = load(byte_level_metadata("gpt-2", bos_token_id=10**6, eos_token_id=-1))
    assert tokenizer.bos_id is None
    assert "bos_token_id" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "rwkv"),
        ({"tokenizer.ggml.model": None}, "no vocabulary"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.tokens": ["a", 1]}, "tokens is not a list of texts"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokens is not a list"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token types"),
        ({"tokenizer.ggml.token_type": [1.5, 2]}, "whole numbers"),
        ({"tokenizer.ggml.merges": None}, "no merges"),
        ({"tokenizer.ggml.bos_token_id": "one"}, "bos_token_id"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token"),
        ({"tokenizer.chat_template": 7}, "chat_template"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": ["x"]}, "scores"),
    ],
)
def test_a_damaged_vocabulary_is_refused_with_the_reason(change, reason):
    with pytest.raises(TokenizerError, match=reason):
        load(byte_level_metadata("gpt-2") | change)


def test_a_vocabulary_of_150000_tokens_is_rebuilt_in_seconds():
    draw = random.Random(4)
    alphabet = BYTE_LEVEL["tokens"][3:258]
    tokens, merges = list(dict.fromkeys(alphabet)), []
    known = set(tokens)
    while len(tokens) < 150_000:
        left, right = draw.choice(tokens), draw.choice(alphabet)
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    began = time.process_time()
    tokenizer = load(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * len(tokens),
            "tokenizer.ggml.merges": merges,
        }
    )
    # About 1 s; the limit is for slow machines that measure coverage.
    assert time.process_time() - began < 5
    assert tokenizer.vocab_size == 150_000


@pytest.mark.model
def test_the_default_model_gives_the_ids_of_its_training(default_model, tmp_path):
    tokenizer = load_tokenizer(open_checkpoint(str(default_model), tmp_path))
    assert tokenizer.vocab_size == 49152
    assert tokenizer.stop_ids == {0, 2}
    assert not tokenizer.adds_bos
    assert tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n", add_bos=True) == [
        *(1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198),
    ]
    prompt = render_chat(
        tokenizer.chat_template or "",
        [{"role": "user", "content": "Hi"}],
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    for text in [*REFERENCE["texts"], prompt]:
        detokenizer = tokenizer.detokenizer()
        pieces = [detokenizer.push(token) for token in tokenizer.encode(text, add_bos=True)]
        assert "".join(pieces) + detokenizer.finish() == text
