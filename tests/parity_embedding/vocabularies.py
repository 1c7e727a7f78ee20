"""Tiny vocabularies of the three kinds that embedding models have, as a Hugging Face folder keeps them."""

import json
import re
import string
from pathlib import Path

from cases import VOCAB_SIZE, Case
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other dog jumps over the fox",
    "she sells sea shells on the sea shore; the shells that she sells are sea shells, I am sure",
    "there is no one here that thinks that this is the thing, and there was nothing in the other tin",
)
LETTERS = string.ascii_lowercase + string.digits + ".,:;?!é世界"


WORDS = sorted({word for line in CORPUS for word in re.findall(r"[a-z]+", line)}, key=lambda word: (-len(word), word))
ENDINGS = ("##ing", "##er", "##ps", "##is")


def build(case: Case) -> Tokenizer:
    """The vocabulary of a case, of exactly VOCAB_SIZE tokens."""
    pad_first = case.config.get("pad_token_id", 0) == 0
    special = [*(("[PAD]", "[UNK]") if pad_first else ("[UNK]", "[PAD]")), *filter(None, case.ends), "[MASK]"]
    tokenizer = _KINDS[case.vocabulary](special)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"{case.name}: {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    first, last = case.ends
    around = " ".join(part for part in (first, "$A", last) if part)
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, pair=f"{around} $B:1 {last}:1" if last else f"{around} $B:1", special_tokens=ids
    )
    return tokenizer


def _filled(tokens: list[str]) -> list[str]:
    """As many tokens as there have to be."""
    return [*tokens, *(f"[unused{index}]" for index in range(VOCAB_SIZE - len(tokens)))]


def _wordpiece(special: list[str]) -> Tokenizer:
    tokens = _filled([*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), *ENDINGS, *WORDS])
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _unigram(special: list[str]) -> Tokenizer:
    pieces = _filled([*special, "\u2581", *LETTERS, *(f"\u2581{word}" for word in WORDS), "s", "ing", "er", "the"])
    scores = [
        (piece, 0.0 if piece in special else -3.0 - index / 16) for index, piece in enumerate(dict.fromkeys(pieces))
    ]
    scores += [(f"[unused{index}]", -99.0) for index in range(VOCAB_SIZE - len(scores), 0, -1)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=special.index("[UNK]"), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _bpe(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    more = "said that jump over forty dogs; sure of this shell, then another and a fox that sells"
    tokenizer.train_from_iterator([*CORPUS, more, "h\u00e9llo \u4e16\u754c 42 : ? N"], trainer)
    return tokenizer


_KINDS = {"wordpiece": _wordpiece, "unigram": _unigram, "bpe": _bpe}


def write(tokenizer: Tokenizer, folder: Path, case: Case) -> None:
    if case.truncates:
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=12, pad_id=0, pad_token="[PAD]")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = {"model_max_length": 512, "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
