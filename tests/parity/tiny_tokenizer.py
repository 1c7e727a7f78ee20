"""The one vocabulary of all fixtures: a byte-level BPE of a few merges, as a Hugging Face folder keeps it."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 300
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
BOS, EOS, PAD = 1, 2, 3

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other dog jumps over the fox",
    "she sells sea shells on the sea shore; the shells that she sells are sea shells, I am sure",
    "there is no one here that thinks that this is the thing, and there was nothing in the other tin",
)

PROMPTS = (
    "the fox said: that is the other thing, héllo 世界 and 42 dogs jump over it",
    "she sells the sea, and then?",
    "no",
)


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
    settings = {
        "add_bos_token": False,
        "bos_token": SPECIAL[BOS],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    generation = {"bos_token_id": BOS, "do_sample": False, "eos_token_id": [EOS, 0], "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
