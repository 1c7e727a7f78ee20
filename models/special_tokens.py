"""The special tokens that mean the same in every model that has them, by their texts."""

END_OF_TURN = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek writes it with full-width bars
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Tokens after which a model has nothing more to say; the last three end a file among several.

Checkpoints often name only one of theirs as EOS, and conversions give some the type of plain text. Source: llama.cpp,
`src/llama-vocab.cpp`, the list of end-of-generation tokens (as vendored by Ollama v0.24.0).
"""
