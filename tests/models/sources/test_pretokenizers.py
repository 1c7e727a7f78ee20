"""How each family of vocabularies cuts text."""

import pytest
from tokenizers import Regex, pre_tokenizers

from models.sources.pretokenizers import FALLBACK, PRETOKENIZERS, Pretokenizer


def cuts(name: str, text: str) -> list[str]:
    return cuts_of(PRETOKENIZERS[name], text)


def cuts_of(family: Pretokenizer, text: str) -> list[str]:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in family.patterns]
    return [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("names", "text", "pieces"),
    [
        ("gpt-2 olmo smollm default", "It's fine", ["It", "'s", " fine"]),
        ("falcon", "It's fine", ["It", "'", "s", " fine"]),
        ("gpt-2 smollm", "IT'S", ["IT", "'", "S"]),
        ("llama-bpe qwen2 deepseek-r1-qwen qwen35 seed-coder bailingmoe", "IT'S", ["IT", "'S"]),
        ("gpt-4o kimi-k2", "IT'S", ["IT'S"]),
        ("tekken", "IT'S", ["IT", "'S"]),
        ("gpt-2 olmo exaone4", "a 12345", ["a", " 12345"]),
        ("llama-bpe glm4 dbrx gpt-4o kimi-k2 deepseek-v3", "12345", ["123", "45"]),
        ("qwen2 stablelm2 smollm starcoder command-r tekken deepseek-coder", "123", ["1", "2", "3"]),
        ("deepseek-llm", "12345", ["12345"]),
        ("falcon", "x 12345", ["x", " ", "123", "45"]),
        ("superbpe", "1234567", ["1", "234", "567"]),
        ("gpt-2 llama-bpe qwen2 smollm gpt-4o", "a   b", ["a", "  ", " b"]),
        ("llama-bpe qwen2 gpt-4o tekken deepseek-v3", "a.\n\nb", ["a", ".\n\n", "b"]),
        ("gpt-2 smollm", "a.\n\nb", ["a", ".", "\n", "\n", "b"]),
        ("gpt-4o tekken kimi-k2", "HelloWorld fooBar", ["Hello", "World", " foo", "Bar"]),
        ("llama-bpe qwen2 gpt-2", "HelloWorld", ["HelloWorld"]),
        ("gpt-4o tekken", "a/\n/b", ["a", "/\n/", "b"]),
        ("kimi-k2", "abc漢字def", ["abc", "漢字", "def"]),
        ("deepseek-v3 hunyuan-dense", "漢字のabc", ["漢字の", "abc"]),
        ("deepseek-v3", "(x .y", ["(x", " .", "y"]),
        ("deepseek-llm", "the ქართული end", ["the", " ", "ქართული", " end"]),
        ("deepseek-coder", "a_b\n", ["a", "_", "b", "\n"]),
        ("qwen35", "e\u0301a", ["e\u0301a"]),
        ("qwen2", "e\u0301a", ["e", "\u0301a"]),
        ("bailingmoe", "a\n\n b", ["a", "\n\n", " b"]),
        ("seed-coder", "a.\nb", ["a", ".", "\n", "b"]),
        ("poro-chat bloom", "ab, c.d", ["ab", ",", " c", ".", "d"]),
        ("viking", "ab12, c", ["ab", "1", "2", ",", " c"]),
        ("chameleon", "a\tb    c12", ["a", "\t", "b", "    ", "c", "1", "2"]),
    ],
)
def test_a_family_cuts_where_its_training_did(names, text, pieces):
    assert {name: cuts(name, text) for name in names.split()} == dict.fromkeys(names.split(), pieces)


@pytest.mark.parametrize("name", sorted(PRETOKENIZERS))
def test_nothing_is_lost_by_cutting(name):
    text = "It's 12345 things:\n\n  日本語 HelloWorld, ½ ქართული e\u0301 👩‍👩‍👧 IMGIMGABZ\t.\r\n \u00a0x "
    assert "".join(cuts(name, text)) == text


def test_the_fallback_cuts_punctuation_and_threes_of_digits():
    assert cuts_of(FALLBACK, "It's 12345") == ["It", "'", "s", " ", "123", "45"]


def test_what_the_file_leaves_unsaid_is_known_per_family():
    assert {name for name, family in PRETOKENIZERS.items() if family.adds_bos} >= {"llama-bpe", "tekken"}
    assert not PRETOKENIZERS["qwen2"].adds_bos
    assert PRETOKENIZERS["llama-bpe"].whole_words
    assert not PRETOKENIZERS["gpt-2"].whole_words
