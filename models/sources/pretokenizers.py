"""The regular expressions that cut text before byte-level BPE, by the name a GGUF file gives them.

A vocabulary is right only with the expressions it was trained with, and a GGUF file holds their name alone
(`tokenizer.ggml.pre`). The expressions here are the ones the models' own `tokenizer.json` files state, in Oniguruma's
dialect; where several stand in a row, each cuts the pieces the one before it left.

Source: llama.cpp, `src/llama-vocab.cpp` (the names and which of them go together), as vendored by Ollama v0.24.0.
"""

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """The family that began with cl100k: a word may carry one leading sign, digits come in groups."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(digits: str, *, suffix: str = "", except_in: str = "", punctuation_tail: str = r"[\r\n/]*") -> str:
    """The family that began with o200k: a word breaks where lower case turns to upper."""
    mark = r"[^\r\n\p{L}\p{N}]?"
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{except_in}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{except_in}]"
    return "|".join(
        (
            f"{mark}{upper}*{lower}+{suffix}",
            f"{mark}{upper}+{lower}*{suffix}",
            digits,
            rf" ?[^\s\p{{L}}\p{{N}}]+{punctuation_tail}",
            _SPACES,
        )
    )


# Cased letters of the alphabets DeepSeek's expression spells out; Georgian, the mathematical alphabets and scripts
# younger than its list are not among them.
_DEEPSEEK_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{0560}-\x{0588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8a}\x{2d00}-\x{2d2d}\x{a790}-\x{a7ff}"
    r"\x{ab30}-\x{ab68}\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}"
    r"\x{1df00}-\x{1df2a}]]"
)
_EAST_ASIAN = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+"

_QWEN = (_words(r"\p{N}"),)
_LLAMA3 = (_words(r"\p{N}{1,3}"),)
_DIGITS_THEN_GPT2 = (r"\p{N}", _GPT2)
_O200K = (_cased_words(r"\p{N}{1,3}", suffix=f"{_CONTRACTIONS}?"),)
_NON_SPACE_WORDS = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001 - the signs that end a word in these models' languages
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+",
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
    ),
)


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    """How one family of vocabularies cuts text, and what its files leave unsaid.

    Attributes:
        patterns: Applied in order.
        whole_words: A piece that is a token as it stands is not built up by merges.
        composes: Text is brought to Unicode's composed form (NFC) first. llama.cpp leaves this out; the models were
            trained with it.
        adds_bos: What holds if the file does not say whether a prompt begins with BOS.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    composes: bool = False
    adds_bos: bool = False


# For a file that names none, or one unknown here: what llama.cpp does then.
FALLBACK = Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

_FAMILIES: tuple[tuple[Pretokenizer, str], ...] = (
    (
        Pretokenizer(_LLAMA3, whole_words=True, adds_bos=True),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (Pretokenizer(_LLAMA3), "dbrx smaug-bpe chatglm-bpe glm4"),
    (Pretokenizer(_QWEN, composes=True), "qwen2"),
    (Pretokenizer(_QWEN), "deepseek-r1-qwen kormo stablelm2 megrez hunyuan grok-2"),
    (
        Pretokenizer(
            (
                (
                    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
                ),
            ),
            composes=True,
        ),
        "qwen35",
    ),
    (
        Pretokenizer((_GPT2,)),
        (
            # Ollama's converter writes "default" where tokenizer.json has no expression but the library's own.
            "default gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-code jina-v2-es jina-v2-de roberta-bpe gigachat "
            "a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4"
        ),
    ),
    (Pretokenizer(_DIGITS_THEN_GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    (Pretokenizer((_cased_words(r"\p{N}"),), whole_words=True, adds_bos=True), "tekken"),
    (Pretokenizer(_O200K), "gpt-4o llama4 minimax-m2"),
    (Pretokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")), "falcon"),
    (
        Pretokenizer(
            (
                r"[\r\n]",
                rf"\s?{_DEEPSEEK_LETTERS}+",
                r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
                r"\s+$",
                _EAST_ASIAN,
                r"\p{N}+",
            )
        ),
        "deepseek-llm",
    ),
    (Pretokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")), "deepseek-coder"),
    (Pretokenizer(_DEEPSEEK3), "deepseek-v3 hunyuan-dense"),
    (Pretokenizer((_NON_SPACE_WORDS,)), "poro-chat bloom gpt3-finnish"),
    (Pretokenizer((_NON_SPACE_WORDS, r"\p{N}")), "viking"),
    (Pretokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")), "superbpe"),
    (
        Pretokenizer(
            (
                (
                    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
                    r"|\s+(?!\S)|\s+"
                ),
            )
        ),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (
        Pretokenizer(
            (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
        ),
        "seed-coder",
    ),
    (
        Pretokenizer(
            (
                r"\p{Han}+|"
                + _cased_words(
                    r"\p{N}{1,3}",
                    suffix=f"{_CONTRACTIONS}?",
                    except_in=r"&&[^\p{Han}]",
                    punctuation_tail=r"[\r\n]*",
                ),
            )
        ),
        "kimi-k2",
    ),
    (
        Pretokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            adds_bos=True,
        ),
        "chameleon",
    ),
)

PRETOKENIZERS: dict[str, Pretokenizer] = {name: family for family, names in _FAMILIES for name in names.split()}
