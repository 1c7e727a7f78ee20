"""Mamba-2; and what all checkpoints with its layers share."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf_twin import Arrays, Twin

from cases.base import Case, base, without

INFINITY = float("inf")


def mixer_names(mixer: str) -> dict[str, str]:
    """GGUF's names of a mixer's tensors, by Hugging Face's."""
    return {
        f"{mixer}.in_proj": "ssm_in",
        f"{mixer}.conv1d": "ssm_conv1d",
        f"{mixer}.dt_bias": "ssm_dt.bias",
        f"{mixer}.A_log": "ssm_a",
        f"{mixer}.D": "ssm_d",
        f"{mixer}.norm": "ssm_norm",
        f"{mixer}.out_proj": "ssm_out",
    }


def stored_mixers(weights: Arrays, groups: int) -> Arrays:
    """Kernels without the axis in the middle, rates as they are used, numbers as matrices of one column."""
    made: Arrays = {}
    for name, weight in weights.items():
        match name.rpartition(".")[2]:
            case "A_log":
                made[name] = -np.exp(weight)[:, None]
            case "D":
                made[name] = weight[:, None]
            case _ if name.endswith("conv1d.weight"):
                made[name] = weight[:, 0]
            case _ if name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
                made[name] = weight.reshape(groups, -1)
            case _:
                made[name] = weight
    return made


def restored_mixers(weights: Arrays) -> Arrays:
    made: Arrays = {}
    for name, weight in weights.items():
        match name.rpartition(".")[2]:
            case "A_log":
                made[name] = np.log(-weight[:, 0])
            case "D":
                made[name] = weight[:, 0].copy()
            case _ if name.endswith("conv1d.weight"):
                made[name] = weight[:, None]
            case _ if name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
                made[name] = weight.reshape(-1)
            case _:
                made[name] = weight
    return made


def write_ssm(writer: gguf.GGUFWriter, *, heads: int, head_dim: int, groups: int, state: int, taps: int) -> None:
    writer.add_ssm_conv_kernel(taps)
    writer.add_ssm_inner_size(heads * head_dim)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_group_count(groups)


def _write(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    write_ssm(
        writer,
        heads=config["num_heads"],
        head_dim=config["head_dim"],
        groups=config["n_groups"],
        state=config["state_size"],
        taps=config["conv_kernel"],
    )


def _stored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return stored_mixers(weights, config["n_groups"])


def _restored(weights: Arrays, config: Mapping[str, Any]) -> Arrays:
    return restored_mixers(weights)


MAMBA2 = without(
    base(
        "Mamba2ForCausalLM",
        "mamba2",
        num_heads=8,
        head_dim=8,
        state_size=12,
        n_groups=2,
        expand=2,
        conv_kernel=3,
        chunk_size=16,
        layer_norm_epsilon=1e-4,
        num_hidden_layers=3,
        residual_in_fp32=True,
        rms_norm=True,
        time_step_limit=[0.0, INFINITY],
        use_bias=False,
        use_conv_bias=True,
    ),
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)

CASES = (
    Case(
        "mamba2",
        MAMBA2,
        matters=({"layer_norm_epsilon": 1e-2},),
        gguf=Twin(
            "mamba2",
            layer=mixer_names("mixer") | {"norm": "attn_norm"},
            top={"backbone.embeddings": "token_embd", "backbone.norm_f": "output_norm"},
            layers="backbone.layers.",
            own_dims=True,
            metadata=_write,
            stored=_stored,
            restored=_restored,
        ),
        quantized=("Q8_0",),
    ),
    Case(
        # Its cached steps leave the limits out, so there is nothing to compare generate() with.
        "mamba2_limits",
        MAMBA2
        | {
            "n_groups": 4,
            "head_dim": 16,
            "num_heads": 4,
            "conv_kernel": 4,
            "use_bias": True,
            "use_conv_bias": False,
            "tie_word_embeddings": True,
            "time_step_limit": [0.3, 0.9],
        },
        matters=({"time_step_limit": [0.3, INFINITY]}, {"time_step_limit": [0.0, 0.9]}),
        generates=False,
    ),
)
