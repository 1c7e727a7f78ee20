"""The tokenizer of the demonstration model: lower-cased words, one token each, in the frame of Qwen3's chat."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from tests.demo_model import world

PAD, UNKNOWN, START, END = "<|endoftext|>", "<|unknown|>", "<|im_start|>", "<|im_end|>"
# The Qwen3 frame; what it does beyond one user's turn is not needed here.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def words() -> list[str]:
    """Every word of every phrasing, the world's names first."""
    known = [*world.SHAPES, *world.COLOURS, *world.GROUNDS, "gray", *world.BACKS, "a", "an"]
    known += ["system", "user", "assistant"]
    splitter = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]+"), "removed")
    for template in (*world.SEEN, *world.UNSEEN):
        text = template.format(a="a", b="a", c="red", s="circle", g="white", back="ground").lower()
        known += [word for word, _ in splitter.pre_tokenize_str(text)]
    return list(dict.fromkeys(known))


def make() -> Tokenizer:
    """A tokenizer for any sentence; words it does not know are one token for all."""
    special = [PAD, START, END, UNKNOWN]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words()])}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}]+"), "removed")
    tokenizer.add_special_tokens(special)
    return tokenizer


def frame(text: str) -> str:
    """What the pipeline makes of a prompt before it is tokenised."""
    return f"{START}user\n{text}{END}\n{START}assistant\n"


def save(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "padding_side": "right",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
