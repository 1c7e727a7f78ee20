"""What the fixtures are: one Case a folder, for a family of models and a way from its hidden states to vectors.

A configuration is written here as published checkpoints write theirs, keys that nobody reads included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Vocabulary = Literal["wordpiece", "unigram", "bpe"]


@dataclass(frozen=True, slots=True)
class Case:
    """One fixture.

    `matters` lists changes of the reference's configuration; each must change the vectors, else the fixture could not
    see an implementation that ignores the feature.
    """

    name: str
    config: Mapping[str, object]
    vocabulary: Vocabulary
    pooling: str
    """The key of 1_Pooling/config.json that is true; empty: there is no modules.json."""
    normalize: bool = True
    dense: tuple[tuple[int, str, bool], ...] = ()
    """Outputs, activation and bias of each dense layer."""
    ends: tuple[str, str] = ("[CLS]", "[SEP]")
    """What goes around a text; an empty text is nothing."""
    max_seq_length: int | None = None
    truncates: bool = False
    """tokenizer.json carries a truncation and a padding, which are not to be obeyed."""
    lower_case: bool = False
    prefix: str = ""
    """What names of tensors begin with, as models with a head were saved."""
    head: Mapping[str, tuple[int, ...]] | None = None
    """Tensors of a head that nobody asks for."""
    matters: tuple[Mapping[str, object], ...] = ()
    gguf: str = ""
    """`general.architecture` of a GGUF twin."""


VOCAB_SIZE = 160
WIDTH = 24


def _bert(architecture: str, model_type: str, **more: object) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 96,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": VOCAB_SIZE,
        **more,
    }


_MLM_HEAD = {"cls.predictions.bias": (VOCAB_SIZE,), "cls.predictions.transform.dense.weight": (WIDTH, WIDTH)}
_ROBERTA_HEAD = {"lm_head.bias": (VOCAB_SIZE,), "lm_head.dense.weight": (WIDTH, WIDTH)}
_POOLER = {"pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,), "embeddings.position_ids": (1, 96)}

_DISTILBERT: dict[str, object] = {
    "activation": "gelu",
    "attention_dropout": 0.1,
    "dim": WIDTH,
    "dropout": 0.1,
    "hidden_dim": 40,
    "initializer_range": 0.02,
    "max_position_embeddings": 96,
    "model_type": "distilbert",
    "n_heads": 3,
    "n_layers": 2,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "vocab_size": VOCAB_SIZE,
}

ENCODERS = (
    Case(
        "bert",
        _bert("BertModel", "bert", position_embedding_type="absolute"),
        "wordpiece",
        "pooling_mode_mean_tokens",
        max_seq_length=64,
        truncates=True,
        head=_POOLER,
        matters=({"layer_norm_eps": 1e-2}, {"num_attention_heads": 6}),
        gguf="bert",
    ),
    Case(
        "bert_masked",
        _bert("BertForMaskedLM", "bert", hidden_act="gelu_new", layer_norm_eps=1e-2),
        "wordpiece",
        "pooling_mode_cls_token",
        normalize=False,
        prefix="bert.",
        head=_MLM_HEAD,
        matters=({"hidden_act": "gelu"}, {"layer_norm_eps": 1e-12}),
    ),
    Case("bert_plain", _bert("BertModel", "bert", num_hidden_layers=1), "wordpiece", ""),
    Case(
        "roberta",
        _bert("RobertaModel", "roberta", pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5),
        "bpe",
        "pooling_mode_mean_sqrt_len_tokens",
        normalize=False,
        ends=("<s>", "</s>"),
    ),
    Case(
        "roberta_masked",
        _bert("RobertaForMaskedLM", "roberta", pad_token_id=1, type_vocab_size=1, num_hidden_layers=1),
        "bpe",
        "pooling_mode_mean_tokens",
        ends=("<s>", "</s>"),
        prefix="roberta.",
        head=_ROBERTA_HEAD,
    ),
    Case(
        "xlm_roberta",
        _bert("XLMRobertaModel", "xlm-roberta", pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5),
        "unigram",
        "pooling_mode_mean_tokens",
        ends=("<s>", "</s>"),
        matters=({"pad_token_id": 3},),
        gguf="bert",
    ),
    Case(
        "xlm_roberta_masked",
        _bert("XLMRobertaForMaskedLM", "xlm-roberta", pad_token_id=1, type_vocab_size=1, num_hidden_layers=1),
        "unigram",
        "pooling_mode_max_tokens",
        ends=("<s>", "</s>"),
        prefix="roberta.",
        head=_ROBERTA_HEAD,
    ),
    Case(
        "mpnet",
        _bert("MPNetModel", "mpnet", pad_token_id=1, relative_attention_num_buckets=32, layer_norm_eps=1e-5),
        "wordpiece",
        "pooling_mode_mean_tokens",
        ends=("<s>", "</s>"),
        head={"pooler.dense.weight": (WIDTH, WIDTH)},
    ),
    Case(
        "mpnet_masked",
        _bert("MPNetForMaskedLM", "mpnet", pad_token_id=1, num_hidden_layers=1),
        "wordpiece",
        "pooling_mode_mean_tokens",
        ends=("<s>", "</s>"),
        prefix="mpnet.",
        head=_ROBERTA_HEAD,
    ),
    Case(
        "distilbert",
        {"architectures": ["DistilBertModel"], **_DISTILBERT},
        "wordpiece",
        "pooling_mode_mean_tokens",
        matters=({"n_heads": 6}, {"activation": "relu"}),
        gguf="bert",
    ),
    Case(
        "distilbert_masked",
        {"architectures": ["DistilBertForMaskedLM"], **_DISTILBERT, "n_layers": 1},
        "wordpiece",
        "pooling_mode_cls_token",
        normalize=False,
        prefix="distilbert.",
        head={"vocab_projector.bias": (VOCAB_SIZE,), "vocab_transform.weight": (WIDTH, WIDTH)},
    ),
    Case(
        "nomic_bert",
        {
            "architectures": ["NomicBertModel"],
            "model_type": "nomic_bert",
            "activation_function": "swiglu",
            "causal": False,
            "layer_norm_epsilon": 1e-12,
            "max_trained_positions": 2048,
            "mlp_fc1_bias": False,
            "mlp_fc2_bias": False,
            "n_embd": WIDTH,
            "n_head": 3,
            "n_inner": 40,
            "n_layer": 2,
            "n_positions": 96,
            "parallel_block": False,
            "prenorm": False,
            "qkv_proj_bias": False,
            "rotary_emb_base": 1000,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": False,
            "rotary_scaling_factor": None,
            "type_vocab_size": 2,
            "use_rms_norm": False,
            "vocab_size": VOCAB_SIZE,
        },
        "wordpiece",
        "pooling_mode_mean_tokens",
        normalize=False,
        matters=({"rotary_emb_base": 10000},),
        gguf="nomic-bert",
    ),
)

_MODERNBERT: Mapping[str, object] = {
    "model_type": "modernbert",
    "attention_bias": False,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "local_attention": 8,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 96,
    "mlp_bias": False,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 3,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "vocab_size": VOCAB_SIZE,
}

MODERNBERT = (
    Case(
        "modernbert",
        {"architectures": ["ModernBertModel"], **_MODERNBERT},
        "bpe",
        "pooling_mode_cls_token",
        matters=({"local_attention": 6}, {"local_attention": 10}, {"global_attn_every_n_layers": 2}),
    ),
    Case(
        "modernbert_masked",
        {
            "architectures": ["ModernBertForMaskedLM"],
            **_MODERNBERT,
            "num_hidden_layers": 2,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        "bpe",
        "pooling_mode_weightedmean_tokens",
        prefix="model.",
        head={"head.norm.weight": (WIDTH,), "decoder.bias": (VOCAB_SIZE,)},
        matters=({"layer_types": ["full_attention", "full_attention"]},),
    ),
)

_DECODER: Mapping[str, object] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB_SIZE,
}

DECODERS = (
    Case(
        "qwen3_embedding",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **_DECODER,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
        "bpe",
        "pooling_mode_lasttoken",
        ends=("", "[SEP]"),
        prefix="model.",
        gguf="qwen3",
    ),
    Case(
        "mistral_model",
        {
            "architectures": ["MistralModel"],
            "model_type": "mistral",
            **_DECODER,
            "hidden_size": 32,
            "sliding_window": 9,
            "tie_word_embeddings": False,
        },
        "bpe",
        "pooling_mode_mean_tokens",
        dense=((28, "torch.nn.modules.linear.Identity", False), (16, "torch.nn.modules.activation.Tanh", True)),
        ends=("[CLS]", ""),
        matters=({"sliding_window": 8},),
    ),
)

GEMMA = (
    Case(
        "embedding_gemma",
        {
            "architectures": ["Gemma3TextModel"],
            "model_type": "gemma3_text",
            **_DECODER,
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 8,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 8,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "use_bidirectional_attention": True,
            "tie_word_embeddings": True,
        },
        "bpe",
        "pooling_mode_mean_tokens",
        dense=((28, "torch.nn.modules.linear.Identity", False), (20, "torch.nn.modules.linear.Identity", False)),
        ends=("[CLS]", "[SEP]"),
        matters=(
            {"sliding_window": 8},
            {"sliding_window": 12},
            {"use_bidirectional_attention": False},
            {"query_pre_attn_scalar": 12},
            {"rope_local_base_freq": 1000.0},
        ),
        gguf="gemma-embedding",
    ),
)

CASES = (*GEMMA, *ENCODERS, *MODERNBERT, *DECODERS)
