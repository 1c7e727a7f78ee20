"""Mistral."""

from cases.base import Case, base


def _mistral(**more: object) -> dict[str, object]:
    return base("MistralForCausalLM", "mistral", attention_dropout=0.0, **more)


CASES = (
    Case(
        "mistral_window",
        _mistral(num_hidden_layers=2, sliding_window=8),
        matters=({"sliding_window": None}, {"sliding_window": 9}, {"sliding_window": 7}),
    ),
    Case(
        "mistral_head_dim",
        _mistral(
            tie_word_embeddings=True, num_hidden_layers=2, head_dim=12, sliding_window=None, rope_theta=1_000_000.0
        ),
    ),
)
