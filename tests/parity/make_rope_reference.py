"""Write tests/models/ops/rope_reference.json: transformers' rotary frequencies for published and awkward settings.

python tests/parity/make_rope_reference.py
"""

import json
from pathlib import Path

from transformers import LlamaConfig, logging
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

TARGET = Path(__file__).parents[1] / "models" / "ops" / "rope_reference.json"

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + n / 16 for n in range(16)],
    "long_factor": [1.0 + n * n / 4 for n in range(16)],
    "original_max_position_embeddings": 4096,
}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25}

SETTINGS = {
    "default": (64, 10000.0, 2048, None),
    "theta of a million": (128, 1_000_000.0, 32768, None),
    "smollm2": (64, 100_000.0, 8192, None),
    "linear": (128, 10000.0, 8192, {"rope_type": "linear", "factor": 4.0}),
    "linear, old spelling": (128, 10000.0, 8192, {"type": "linear", "factor": 8.0}),
    "llama 3.2": (64, 500_000.0, 131072, LLAMA_3),
    "llama 3.1": (128, 500_000.0, 131072, LLAMA_3 | {"factor": 8.0}),
    "yarn of qwen": (128, 1_000_000.0, 131072, YARN),
    "yarn, old spelling": (
        128,
        1_000_000.0,
        131072,
        {"type" if key == "rope_type" else key: value for key, value in YARN.items()},
    ),
    "yarn, attention factor": (64, 10000.0, 16384, YARN | {"attention_factor": 1.25}),
    "yarn, betas": (64, 10000.0, 16384, YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn, not truncated": (64, 150_000.0, 131072, YARN | {"truncate": False}),
    "yarn, mscale": (64, 10000.0, 16384, YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0}),
    "yarn, equal mscales": (64, 10000.0, 16384, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "yarn, factor of one": (64, 10000.0, 32768, YARN | {"factor": 1.0}),
    "yarn, tiny": (16, 10000.0, 64, YARN | {"original_max_position_embeddings": 16}),
    "longrope": (32, 10000.0, 131072, LONG),
    "longrope, not longer": (32, 10000.0, 4096, LONG),
    "longrope, a row beyond the original context": (32, 10000.0, 131072, LONG),
    "longrope, attention factor": (32, 10000.0, 131072, LONG | {"attention_factor": 1.4}),
    "dynamic": (64, 10000.0, 4096, {"rope_type": "dynamic", "factor": 4.0}),
    "dynamic, a row beyond the context": (64, 10000.0, 4096, {"rope_type": "dynamic", "factor": 4.0}),
    "linear, a part of the head": (
        64,
        500.0,
        4096,
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25},
    ),
    "proportional": (64, 1_000_000.0, 4096, PROPORTIONAL),
    "proportional, linear": (64, 10000.0, 4096, PROPORTIONAL | {"factor": 8.0}),
}
REACH = {"longrope, a row beyond the original context": 4097, "dynamic, a row beyond the context": 16384}
"""Tokens of the row where they matter."""


def main() -> None:
    logging.set_verbosity_error()
    lines = []
    for name, (head_dim, theta, context, scaling) in SETTINGS.items():
        config = LlamaConfig(
            head_dim=head_dim,
            rope_theta=theta,
            max_position_embeddings=context,
            rope_scaling=None if scaling is None else dict(scaling),
        )
        rope = LlamaRotaryEmbedding(config)
        frequencies, attention_scaling = rope.inv_freq, rope.attention_scaling
        if name in REACH:
            frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[rope.rope_type](config, seq_len=REACH[name])
        entry = {
            "name": name,
            "head_dim": head_dim,
            "rope_theta": theta,
            "max_position_embeddings": context,
            "rope_scaling": scaling,
            "reach": REACH.get(name, 0),
            "attention_scaling": float(attention_scaling),
            "frequencies": [float(f"{value:.9g}") for value in frequencies.tolist()],
        }
        lines.append(json.dumps(entry))
    TARGET.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
