"""The same weights as a GGUF file, the way llama.cpp's converter lays them out.

Facts of the format: an encoder's names of tensors; WordPiece with a visible space before what begins a word and
without "##" before what goes on; RoBERTa's table of positions without the rows that nobody looks up.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from cases import Case
from tokenizers import Tokenizer

Arrays = dict[str, np.ndarray]

BERT = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
# As a BERT without kinds of tokens.
DISTILBERT = {
    "attention.q_lin": "attn_q",
    "attention.k_lin": "attn_k",
    "attention.v_lin": "attn_v",
    "attention.out_lin": "attn_output",
    "sa_layer_norm": "attn_output_norm",
    "ffn.lin1": "ffn_up",
    "ffn.lin2": "ffn_down",
    "output_layer_norm": "layer_output_norm",
}
NOMIC = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "emb_ln": "token_embd_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "norm1": "attn_output_norm",
    "mlp.fc11": "ffn_up",
    "mlp.fc12": "ffn_gate",
    "mlp.fc2": "ffn_down",
    "norm2": "layer_output_norm",
}
QWEN3 = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = QWEN3 | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NAMES = {"bert": BERT | DISTILBERT, "nomic-bert": NOMIC, "qwen3": QWEN3, "gemma-embedding": GEMMA}
POOLING = {
    "pooling_mode_mean_tokens": gguf.PoolingType.MEAN,
    "pooling_mode_cls_token": gguf.PoolingType.CLS,
    "pooling_mode_lasttoken": gguf.PoolingType.LAST,
}


def gguf_name(name: str, names: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    if module in names:
        return f"{names[module]}.{kind}"
    parts = module.split(".")
    index = next(place for place, part in enumerate(parts) if part.isdecimal())
    return f"blk.{parts[index]}.{names['.'.join(parts[index + 1 :])]}.{kind}"


def skipped_positions(case: Case) -> int:
    """The rows of RoBERTa's table that no position has."""
    return int(str(case.config["pad_token_id"])) + 1 if "oberta" in str(case.config["architectures"]) else 0


def write_sizes(writer: gguf.GGUFWriter, case: Case) -> None:
    config = dict(case.config)
    writer.add_context_length(
        config.get("max_position_embeddings", config.get("n_positions")) - skipped_positions(case)
    )
    for add, names in (
        (writer.add_embedding_length, ("hidden_size", "n_embd", "dim")),
        (writer.add_block_count, ("num_hidden_layers", "n_layer", "n_layers")),
        (writer.add_feed_forward_length, ("intermediate_size", "n_inner", "hidden_dim")),
        (writer.add_head_count, ("num_attention_heads", "n_head", "n_heads")),
    ):
        add(next(config[name] for name in names if name in config))
    writer.add_pooling_type(POOLING[case.pooling])
    if case.gguf in ("qwen3", "gemma-embedding"):
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        if case.gguf == "gemma-embedding":
            writer.add_sliding_window(config["sliding_window"])
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
            writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
        return
    writer.add_causal_attention(False)
    writer.add_layer_norm_eps(config.get("layer_norm_eps", config.get("layer_norm_epsilon", 1e-12)))
    if case.gguf == "nomic-bert":
        writer.add_rope_freq_base(float(config["rotary_emb_base"]))


def write_vocabulary(writer: gguf.GGUFWriter, case: Case, tokenizer: Tokenizer) -> None:
    state = json.loads(tokenizer.to_str())
    added = {each["content"] for each in state["added_tokens"]}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [gguf.TokenType.CONTROL if token in added else gguf.TokenType.NORMAL for token in tokens]
    first, last = case.ends
    match case.vocabulary:
        case "wordpiece":
            writer.add_tokenizer_model("bert")
            tokens = [
                token if token in added else token[2:] if token.startswith("##") else f"\u2581{token}"
                for token in tokens
            ]
            # As Ollama's converter leaves them out, these have to be found by their texts.
            writer.add_unk_token_id(vocabulary["[UNK]"])
        case "unigram":
            writer.add_tokenizer_model("t5")
            scores = dict(state["model"]["vocab"])
            writer.add_token_scores([float(scores.get(token, 0.0)) for token in tokens])
            writer.add_unk_token_id(vocabulary["[UNK]"])
            writer.add_bos_token_id(vocabulary[first])
            writer.add_eos_token_id(vocabulary[last])
            writer.add_add_space_prefix(True)
        case "bpe":
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
            writer.add_eos_token_id(vocabulary[last])
            if first:
                writer.add_bos_token_id(vocabulary[first])
            writer.add_add_bos_token(bool(first))
            writer.add_add_eos_token(True)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)


def write_dense(writer: gguf.GGUFWriter, case: Case, dense: Arrays) -> None:
    """Gemma's dense layers, which are called by their place among the modules."""
    for index in range(len(case.dense)):
        weight = dense[f"{index}.linear.weight"]
        writer.add_dense_features_dims(f"dense_{index + 2}", weight.shape[1], weight.shape[0])
        writer.add_tensor(f"dense_{index + 2}.weight", weight)


def write(path: Path, case: Case, weights: Arrays, dense: Arrays, tokenizer: Tokenizer) -> None:
    writer = gguf.GGUFWriter(path, case.gguf)
    write_sizes(writer, case)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    write_vocabulary(writer, case, tokenizer)
    skipped = skipped_positions(case)
    for name, weight in weights.items():
        value = weight[skipped:] if name.startswith("embeddings.position") else weight
        shift = np.float32(case.gguf == "gemma-embedding" and name.endswith("norm.weight"))
        writer.add_tensor(gguf_name(name, NAMES[case.gguf]), np.ascontiguousarray(value + shift))
    write_dense(writer, case, dense)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
