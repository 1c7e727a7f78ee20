"""Families of chat models as tests know them: their tokens, where they end, and a conversation as they write it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.ollama.scripted import Vocabulary

CONVERSATION = (("user", "Hi"), ("assistant", "Yo"), ("user", "Go"))
YES = ("Y", "e", "s")


@dataclass(frozen=True)
class Family:
    """What a parent makes of CONVERSATION and the family's model must end at."""

    vocabulary: Vocabulary
    prompt: str
    ends: Sequence[str]
    opening: str = "Ċ"
    """The prompt's last token."""
    base: str = "llama_gqa"
    """The fixture whose architecture it has."""
    known_as: tuple[str, int] = ("", 0)
    """Among the Jinja templates that Ollama recognises: the name and which of that name. Else `template` is used."""
    template: str = ""
    """Ollama's kind of template."""


CLASSIC = {
    "gemma": Family(
        Vocabulary(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<eos>",), "<bos>"),
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
        "<start_of_turn>user\nGo<end_of_turn>\n<start_of_turn>model\n",
        ("<end_of_turn>", "<eos>"),
        known_as=("gemma-instruct", 0),
    ),
    "llama 3": Family(
        Vocabulary(
            (
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
                "<|eom_id|>",
            ),
            ("<|end_of_text|>",),
            "<|begin_of_text|>",
        ),
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        known_as=("llama3-instruct", 0),
    ),
    "phi 3": Family(
        Vocabulary(
            ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), ("<|endoftext|>",), "<s>"
        ),
        "<|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n<|user|>\nGo<|end|>\n<|assistant|>\n",
        ("<|end|>", "<|endoftext|>"),
        known_as=("phi-3", 2),
    ),
    "zephyr": Family(
        Vocabulary(("<s>", "</s>"), ("</s>",), "<s>"),
        "<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n<|user|>\nGo</s>\n<|assistant|>\n",
        ("</s>",),
        known_as=("zephyr", 0),
    ),
    "chatml": Family(
        Vocabulary(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<|endoftext|>",)),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n",
        ("<|im_end|>", "<|endoftext|>"),
        known_as=("chatml", 4),
    ),
    "mistral v7": Family(
        Vocabulary(("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("</s>",), "<s>"),
        "[SYSTEM_PROMPT]Be.[/SYSTEM_PROMPT][INST]Hi[/INST]Yo</s>[INST]Go[/INST]",
        ("</s>",),
        "[/INST]",
        template="[SYSTEM_PROMPT]Be.[/SYSTEM_PROMPT]{{ range .Messages }}"
        '{{ if eq .Role "user" }}[INST]{{ .Content }}[/INST]'
        "{{ else }}{{ .Content }}</s>{{ end }}{{ end }}",
    ),
}

_HARMONY_MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>")
_LATER = "assistant<|channel|>final<|message|>Yes"
_CALLED, _ARGUMENTS = "commentaryĠto=functions.get_weatherĠ", '{"city":"Paris"}'
HARMONY = Family(
    Vocabulary(
        ("<|startoftext|>", "<|endoftext|>", *_HARMONY_MARKS),
        ("<|return|>",),
        words=("final", "analysis", _LATER, _CALLED, "json", _ARGUMENTS),
    ),
    "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Yo<|end|>"
    "<|start|>user<|message|>Go<|end|><|start|>assistant",
    ("<|return|>", "<|call|>"),
    "t",
    "gpt_oss_plain",
    template="{{ range .Messages }}<|start|>{{ .Role }}"
    '{{ if eq .Role "assistant" }}<|channel|>final{{ end }}<|message|>{{ .Content }}<|end|>{{ end }}<|start|>assistant',
)
# A message of thoughts, then one of answer.
HARMONY_THOUGHTS = ("<|channel|>", "analysis", "<|message|>", "H", "m", "<|end|>", "<|start|>", _LATER)
HARMONY_CALL = ("<|channel|>", _CALLED, "<|constrain|>", "json", "<|message|>", _ARGUMENTS, "<|call|>")

NEWEST = {
    "qwen 3": Family(
        CLASSIC["chatml"].vocabulary,
        CLASSIC["chatml"].prompt,
        CLASSIC["chatml"].ends,
        base="qwen3",
    ),
    "gemma 4": Family(
        Vocabulary(
            ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
            ("<eos>", "<turn|>"),
            "<bos>",
            ("thoughtĊ",),
        ),
        "<bos><|turn>user\nHi<turn|>\n<|turn>model\nYo<turn|>\n<|turn>user\nGo<turn|>\n<|turn>model\n",
        ("<turn|>", "<eos>"),
        base="gemma4",
    ),
    "glm 4.7": Family(
        Vocabulary(
            (
                "<|endoftext|>",
                "[gMASK]",
                "<sop>",
                "<|system|>",
                "<|user|>",
                "<|assistant|>",
                "<|observation|>",
                "<think>",
                "</think>",
            ),
            ("<|endoftext|>", "<|user|>", "<|observation|>"),
        ),
        "[gMASK]<sop><|user|>Hi<|assistant|></think>Yo<|user|>Go<|assistant|></think>",
        ("<|user|>", "<|observation|>", "<|endoftext|>"),
        "</think>",
        "glm4_moe_lite",
    ),
    "llama 3": Family(
        CLASSIC["llama 3"].vocabulary,
        CLASSIC["llama 3"].prompt,
        CLASSIC["llama 3"].ends,
        template="{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
        "{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}
