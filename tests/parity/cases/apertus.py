"""Apertus."""

import gguf
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without


def _numbers(writer: gguf.GGUFWriter, weights: Arrays) -> Arrays:
    """The activations' numbers, a list of each kind."""
    found = {name: weight for name, weight in sorted(weights.items()) if ".act_fn." in name}
    lists = {kind: [float(found[name].item()) for name in found if name.endswith(kind)] for kind in KINDS}
    writer.add_xielu_alpha_p(lists["alpha_p"])
    writer.add_xielu_alpha_n(lists["alpha_n"])
    writer.add_xielu_beta(lists["beta"])
    writer.add_xielu_eps(lists["eps"])
    return found


KINDS = ("alpha_p", "alpha_n", "beta", "eps")
APERTUS = base(
    "ApertusForCausalLM",
    "apertus",
    head_dim=16,
    hidden_act="xielu",
    attention_bias=False,
    mlp_bias=False,
    qk_norm=True,
    post_norm=False,
    rope_theta=500.0,
    intermediate_size=64,
)
NAMES = {
    "attention_layernorm": "attn_norm",
    "feedforward_layernorm": "ffn_norm",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES = (
    Case(
        "apertus",
        APERTUS | {"rope_scaling": LLAMA3},
        matters=({"rope_scaling": None}, {"rope_theta": 10000.0}, {"rms_norm_eps": 0.1}),
        gguf=Twin("apertus", NAMES, numbers=_numbers),
        quantized=("Q8_0",),
    ),
    Case(
        "apertus_bias",
        without(APERTUS | {"attention_bias": True, "num_hidden_layers": 2}, "head_dim", "rope_theta"),
        matters=({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},),
    ),
)
