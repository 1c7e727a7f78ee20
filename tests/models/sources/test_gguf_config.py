from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from models.arch import GGUFLayout, discover
from models.errors import CheckpointError
from models.sources.gguf import GGUFFile
from models.sources.gguf_config import hf_name


def layout_of(arch: str) -> GGUFLayout:
    return next(layout for entry in discover() for layout in entry.gguf if arch in layout.architectures)


def config_of(path: Path) -> dict[str, object]:
    return dict(GGUFFile(path, "m").config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.11.attn_norm.weight", "model.layers.11.input_layernorm.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("blk.0.attn_k_norm.weight", "model.layers.0.self_attn.k_norm.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("rope_freqs.weight", None),
        ("blk.0.attn_rot_embd.weight", None),
        ("blk.0.ssm_conv1d.weight", "blk.0.ssm_conv1d.weight"),
        ("v.patch_embd.weight", "v.patch_embd.weight"),
    ],
)
def test_names_are_hugging_faces(name: str, expected: str | None):
    assert hf_name(name, layout_of("qwen3")) == expected


@pytest.mark.parametrize(
    ("arch", "name", "expected"),
    [
        ("lfm2", "blk.3.shortconv.conv.weight", "model.layers.3.conv.conv.weight"),
        ("lfm2", "blk.3.shortconv.in_proj.bias", "model.layers.3.conv.in_proj.bias"),
        ("mamba2", "blk.3.ssm_dt.bias", "backbone.layers.3.mixer.dt_bias"),
        ("mamba2", "blk.3.ssm_a", "backbone.layers.3.mixer.A_log"),
        ("mamba2", "blk.3.ssm_conv1d.bias", "backbone.layers.3.mixer.conv1d.bias"),
        ("mamba2", "output_norm.weight", "backbone.norm_f.weight"),
        ("lfm2", "token_embd_norm.weight", "model.embedding_norm.weight"),
        ("lfm2moe", "blk.3.exp_probs_b.bias", "model.layers.3.feed_forward.expert_bias"),
        ("qwen3next", "blk.3.ssm_in.weight", "model.layers.3.linear_attn.in_proj_qkvz.weight"),
        ("qwen3next", "blk.3.ssm_ba.weight", "model.layers.3.linear_attn.in_proj_ba.weight"),
        ("qwen35", "blk.3.attn_gate.weight", "model.layers.3.linear_attn.in_proj_z.weight"),
        # As llama.cpp and as Ollama name it.
        ("qwen35", "blk.3.ssm_dt.bias", "model.layers.3.linear_attn.dt_bias"),
        ("qwen35", "blk.3.ssm_dt", "model.layers.3.linear_attn.dt_bias"),
        ("qwen35moe", "blk.3.ffn_gate_up_exps.weight", "model.layers.3.mlp.experts.gate_up_proj.weight"),
    ],
)
def test_names_of_recurrent_layers_are_hugging_faces(arch: str, name: str, expected: str):
    assert hf_name(name, layout_of(arch)) == expected


@pytest.mark.parametrize("name", ["v.patch_embedding.weight", "v.blk.3.attn_q.weight", "mm.mm_soft_emb_norm.weight"])
def test_the_vision_tensors_of_ollamas_own_files_are_no_weights_of_the_text_model(name: str):
    assert hf_name(name, layout_of("gemma3")) is None


NARROW, WIDE = np.zeros((32, 64), np.float32), np.zeros((64, 32), np.float32)


@pytest.mark.parametrize(
    ("arch", "names"), [("gemma-embedding", ("dense_2", "dense_3")), ("gemma3", ("dense.0", "dense.1"))]
)
def test_a_gemma_that_pools_sees_both_ways_and_has_its_dense_layers_apart(
    write_gguf, arch: str, names: tuple[str, str]
):
    tensors = {f"{name}.weight": value for name, value in zip(names, (NARROW, WIDE), strict=True)}
    file = GGUFFile(write_gguf(tensors, {f"{arch}.pooling_type": 1}, arch=arch), "m")
    config = dict(file.config)
    assert config["architectures"] == ["Gemma3TextModel"]
    assert config["use_bidirectional_attention"] is True
    assert list(dict(config["gguf_dense"]).items()) == [
        (names[0], {"in_features": 64, "out_features": 32}),
        (names[1], {"in_features": 32, "out_features": 64}),
    ]
    assert [info.name for info in file.infos()] == ["model.embed_tokens.weight"]
    assert [(info.name, info.shape) for info in file.infos(names[1])] == [("linear.weight", (64, 32))]


def test_a_gemma_3_that_does_not_pool_speaks(write_gguf):
    for said in ({}, {"gemma3.pooling_type": 0}):
        config = config_of(write_gguf({}, said, arch="gemma3"))
        assert config["architectures"] == ["Gemma3ForCausalLM"]
        assert "gguf_dense" not in config


def test_a_dense_layer_that_is_no_matrix_is_refused(write_gguf):
    path = write_gguf({"dense_2.weight": np.zeros(64, np.float32)}, arch="gemma-embedding")
    with pytest.raises(CheckpointError, match=r"tensor dense_2\.weight: is no matrix"):
        config_of(path)


def test_an_unknown_architectures_names_stay_for_the_loader_to_refuse():
    assert hf_name("blk.0.attn_q.weight", None) == "blk.0.attn_q.weight"
    assert hf_name("rope_freqs.weight", None) is None
    assert hf_name("blk.0.attn_q_norm.weight", layout_of("llama")) == "blk.0.attn_q_norm.weight"


def test_a_llama_is_described_as_hugging_face_does(write_gguf):
    config = config_of(write_gguf({}, {"llama.rope.freq_base": 5e5, "tokenizer.ggml.eos_token_id": 2}))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    expected = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "vocab_size": 10,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert "sliding_window" not in config


@pytest.mark.parametrize(
    ("dtype", "expected"), [(np.float32, "float32"), (np.float16, "float16"), (np.uint16, "bfloat16")]
)
def test_the_type_is_that_of_the_matrices(write_gguf, dtype: type, expected: str):
    matrix = np.zeros((10, 64), dtype)
    embedding = (matrix.view(np.uint8), Kind.BF16) if dtype is np.uint16 else matrix
    norm = np.ones(64, np.float32)
    config = config_of(write_gguf({"token_embd.weight": embedding, "output_norm.weight": norm}))
    assert config["torch_dtype"] == expected


@pytest.mark.parametrize(("arch", "expected"), [("llama", "float16"), ("gemma3", "bfloat16")])
def test_where_the_matrices_are_of_blocks_it_is_one_that_the_activations_fit(write_gguf, arch: str, expected: str):
    rows = quantize(np.zeros((10, 64), np.float32), Kind.Q8_0)
    assert config_of(write_gguf({"token_embd.weight": (rows, Kind.Q8_0)}, arch=arch))["torch_dtype"] == expected


def test_what_the_tensors_say_counts(write_gguf):
    bias = np.zeros(64, np.float32)
    config = config_of(write_gguf({"output.weight": np.zeros((10, 64), np.float32), "blk.0.attn_q.bias": bias}))
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is True


@pytest.mark.parametrize(
    ("arch", "hf"),
    [
        ("qwen2", ["Qwen2ForCausalLM"]),
        ("qwen3", ["Qwen3ForCausalLM"]),
        ("mistral", ["MistralForCausalLM"]),
    ],
)
def test_every_architecture_keeps_its_own_name_too(write_gguf, arch: str, hf: list[str]):
    config = config_of(write_gguf({}, {f"{arch}.attention.key_length": 32}, arch=arch))
    assert (config["gguf_architecture"], config["architectures"], config["head_dim"]) == (arch, hf, 32)


def test_of_an_architecture_that_nobody_knows_only_the_name_is_told(write_gguf):
    config = config_of(write_gguf({}, arch="rwkv7"))
    assert (config["gguf_architecture"], config["architectures"]) == ("rwkv7", ["rwkv7"])
    assert "hidden_size" not in config


def test_a_llama_with_a_window_is_a_mistral_and_with_experts_no_llama(write_gguf):
    windowed = config_of(write_gguf({}, {"llama.attention.sliding_window": 32}))
    assert (windowed["architectures"], windowed["model_type"]) == (["MistralForCausalLM"], "mistral")
    assert windowed["sliding_window"] == 32
    mixture = config_of(write_gguf({}, {"llama.expert_count": 8, "llama.expert_used_count": 2}))
    assert mixture["architectures"] != ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"type": "linear", "factor": 1.0}, None),
        ({"type": "longrope", "factor": 4.0}, {"rope_type": "longrope", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 30.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 30.0},
        ),
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 0.5},
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5 * (1 + 0.1 * np.log(4.0))},
        ),
    ],
)
def test_rope_scaling_is_told_in_hugging_faces_words(write_gguf, metadata: dict[str, object], scaling: object):
    values = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    found = config_of(write_gguf({}, values))["rope_scaling"]
    assert found is None if scaling is None else found == pytest.approx(scaling)


def test_linear_scaling_of_old_files_is_understood(write_gguf):
    config = config_of(write_gguf({}, {"llama.rope.scale_linear": 4.0}))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_frequency_factors_become_part_of_the_configuration(write_gguf):
    factors = np.array([1, 1, 2, 2, 4, 4, 8, 8], np.float32)
    config = config_of(write_gguf({"rope_freqs.weight": factors}))
    assert config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
    assert config_of(write_gguf({"rope_freqs.weight": np.ones(8, np.float32)}))["rope_scaling"] is None


def test_a_part_of_the_head_that_rotates_is_told(write_gguf):
    assert config_of(write_gguf({}, {"llama.rope.dimension_count": 4}))["partial_rotary_factor"] == 0.25
    assert "partial_rotary_factor" not in config_of(write_gguf({}, {"llama.rope.dimension_count": 16}))


def test_one_value_a_layer_is_taken_if_they_are_alike(write_gguf):
    assert config_of(write_gguf({}, {"llama.attention.head_count": [4, 4]}))["num_attention_heads"] == 4
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count = \[4, 8\]"):
        config_of(write_gguf({}, {"llama.attention.head_count": [4, 8]}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"llama.embedding_length": None}, "has no llama.embedding_length"),
        ({"llama.attention.head_count": 100}, "100 attention heads for a width of 64"),
        ({"llama.block_count": 0}, "llama.block_count = 0"),
        ({"llama.context_length": "many"}, "llama.context_length = 'many'"),
        ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base = inf"),
        ({"llama.rope.scaling.type": 3}, "llama.rope.scaling.type = 3"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(write_gguf, change: dict[str, object], reason: str):
    with pytest.raises(CheckpointError, match=reason):
        config_of(write_gguf({}, change))


def test_a_file_without_an_embedding_is_refused(write_gguf):
    path = write_gguf({"token_embd.weight": None})
    with pytest.raises(CheckpointError, match=r"tensor token_embd\.weight"):
        config_of(path)
