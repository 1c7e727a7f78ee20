"""StarCoder2."""

from collections.abc import Mapping

import gguf
from gguf_twin import Twin

from cases.base import Case, base, without

NAMES = {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def write_window(writer: gguf.GGUFWriter, config: Mapping[str, object]) -> None:
    if config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])


def _starcoder2(**more: object) -> dict[str, object]:
    said: dict[str, object] = {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "sliding_window": None,
        "mlp_type": "default",
        "norm_type": "layer_norm",
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    }
    return without(base("Starcoder2ForCausalLM", "starcoder2"), "rms_norm_eps") | said | more


CASES = (
    Case(
        "starcoder2",
        _starcoder2(intermediate_size=64, norm_epsilon=1e-2),
        matters=({"norm_epsilon": 1e-5}, {"rope_theta": 10000.0}, {"hidden_act": "silu"}),
        gguf=Twin("starcoder2", NAMES, metadata=write_window),
        quantized=("Q8_0",),
    ),
    Case(
        "starcoder2_window",
        _starcoder2(
            sliding_window=8, use_bias=False, hidden_act="gelu", tie_word_embeddings=False, num_key_value_heads=4
        ),
        matters=({"sliding_window": 9}, {"hidden_act": "relu"}),
    ),
)
