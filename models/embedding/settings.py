"""How a checkpoint's hidden states become a vector: pooling, dense layers, normalisation and limits, as it says itself.

A folder of sentence-transformers has modules.json and a configuration for each module. A GGUF file has a number. A
plain encoder says nothing, and sentence-transformers takes the mean then.

Source: sentence-transformers 6.2 (`SentenceTransformer`, `models.Pooling`, `models.Dense`, `models.Transformer`);
llama.cpp `enum llama_pooling_type`; ollama v0.24.0 model/models/{bert,nomicbert,qwen3}.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from models.arch import Model, build_model, discover
from models.checkpoint import JSON, Checkpoint
from models.config_reader import ConfigReader
from models.errors import CheckpointError, UnsupportedArchitecture
from models.weights.matching import model_of

Pooling: TypeAlias = Literal["cls", "mean", "last", "max", "mean_sqrt_len", "weightedmean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
DenseActivation: TypeAlias = Literal["identity", "tanh", "relu", "gelu", "sigmoid"]

_log = logging.getLogger(__name__)

_MODES: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_NAMED_MODES: Mapping[str, Pooling] = {
    **{name: name for name in POOLINGS},
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "lasttoken": "last",
}
_GGUF_POOLINGS: Mapping[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
_DENSE_ACTIVATIONS: Mapping[str, DenseActivation] = {
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
}
_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense layer behind pooling: a component of the checkpoint with `linear.weight`, and with `bias` the like."""

    component: str
    inputs: int
    outputs: int
    bias: bool
    activation: DenseActivation


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """How a text becomes a vector."""

    pooling: Pooling
    width: int
    """Values of a vector."""
    normalize: bool
    """To a length of one."""
    dense: tuple[Dense, ...] = ()
    max_tokens: int | None = None
    """The longest text, special tokens included, where it is shorter than the model allows."""
    lower_case: bool = False
    default_width: int | None = None
    """Values that are left where a request does not say how many; None: all."""
    widths: tuple[int, ...] = ()
    """The only lengths that a vector may be cut to; empty: all."""


def embedding_config(config: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """The configuration of a model for embeddings: without a head, whether it was saved with one or not."""
    names = ConfigReader(config).texts("architectures") or []
    try:
        build_model(config)
    except UnsupportedArchitecture:
        names = [f"{name.removesuffix('Model')}ForCausalLM" if name.endswith("Model") else name for name in names]
    # The output matrix is nobody's then: a copy of it may be left over.
    return {**config, "architectures": list(names), "tie_word_embeddings": True}


def read_settings(checkpoint: Checkpoint, asked: Pooling | None = None) -> EmbeddingSettings | None:
    """What the checkpoint says, pooled as asked where somebody asks; None: it is no embedding model. Thread: any.

    Raises:
        CheckpointError: a file is malformed, or asks for what is not supported here.
        UnsupportedArchitecture: it is an embedding model of an unknown architecture.
    """
    modules = _read_json(checkpoint, "modules.json")
    says_so = asked is not None or modules is not None or checkpoint.config.get("ollama_embedding") is True
    says_so = says_so or _as_int(checkpoint.config.get("gguf_pooling_type")) in _GGUF_POOLINGS
    if not (says_so or _is_encoder(checkpoint)):
        return None
    model = model_of(checkpoint, embedding_config(checkpoint.config))
    if modules is None:
        settings = _of_gguf_or_plain(checkpoint, model, asked)
    elif isinstance(modules, list):
        settings = _of_modules(checkpoint, modules, model, asked)
    else:
        raise CheckpointError("is no list of modules", file="modules.json")
    return _with_limits(checkpoint, settings)


def _is_encoder(checkpoint: Checkpoint) -> bool:
    names = ConfigReader(checkpoint.config).texts("architectures") or []
    return any(each.is_encoder and set(names) & set(each.hf) for each in discover())


def _as_int(value: JSON) -> int:
    return value if isinstance(value, int) else 0


def _of_gguf_or_plain(checkpoint: Checkpoint, model: Model, asked: Pooling | None) -> EmbeddingSettings:
    config = checkpoint.config
    stated = _GGUF_POOLINGS.get(_as_int(config.get("gguf_pooling_type")))
    pooling = asked or stated or ("mean" if model.is_encoder else "last")
    normalize = config.get("gguf_normalize_embeddings")
    if not isinstance(normalize, bool):
        # As Ollama's own child does where the file is silent.
        normalize = config.get("gguf_architecture") != "nomic-bert"
    dense: list[Dense] = []
    width = model.config.hidden_size
    for name, sizes in ConfigReader(config).sections("gguf_dense").items():
        dense.append(_checked(sizes, width, name, bias=False, activation="identity"))
        width = dense[-1].outputs
    return EmbeddingSettings(pooling, width, normalize, tuple(dense))


def _of_modules(checkpoint: Checkpoint, modules: list[JSON], model: Model, asked: Pooling | None) -> EmbeddingSettings:
    """The chain that modules.json lists: transformer, pooling, dense layers, normalisation."""
    pooling, width, normalize = asked, model.config.hidden_size, False
    dense: list[Dense] = []
    rank = -1
    for entry in modules:
        kind, path = _module(entry)
        order = {"Transformer": 0, "Pooling": 1, "Dense": 2, "Normalize": 3}.get(kind)
        if order is None or order < rank or (order == rank and kind != "Dense"):
            raise CheckpointError(f"the module {kind!r} is not supported where it stands", file="modules.json")
        rank = order
        match kind:
            case "Transformer" if path:
                raise CheckpointError(f"the transformer lies in the folder {path!r}; name that", file="modules.json")
            case "Pooling":
                pooling = asked or _pooling(checkpoint, path, width)
            case "Dense":
                dense.append(_dense(checkpoint, path, width))
                width = dense[-1].outputs
            case "Normalize":
                normalize = True
    if pooling is None:
        raise CheckpointError("there is no module Pooling", file="modules.json")
    return EmbeddingSettings(pooling, width, normalize, tuple(dense))


def _module(entry: JSON) -> tuple[str, str]:
    match entry:
        case {"type": str(kind), "path": str(path)}:
            return kind.rpartition(".")[2], path
    raise CheckpointError(f"a module is malformed: {json.dumps(entry)[:100]}", file="modules.json")


def _pooling(checkpoint: Checkpoint, path: str, width: int) -> Pooling:
    file = f"{path}/config.json"
    reader = _read_object(checkpoint, file, required=True)
    modes = [mode for key, mode in _MODES.items() if reader.flag(key, default=False)]
    if name := reader.text("pooling_mode", ""):
        if name not in _NAMED_MODES:
            raise CheckpointError(f"pooling_mode {name!r} is not supported", file=file)
        modes = [_NAMED_MODES[name]]
    if len(modes) != 1:
        raise CheckpointError(f"{len(modes)} pooling modes are set; one is supported", file=file)
    for key in ("word_embedding_dimension", "embedding_dimension"):
        if (stated := reader.integer(key, width)) != width:
            raise CheckpointError(f"{key} is {stated}, and the model's width {width}", file=file)
    if not reader.flag("include_prompt", default=True):
        raise CheckpointError("include_prompt false is not supported: a text is pooled whole", file=file)
    return modes[0]


def _dense(checkpoint: Checkpoint, path: str, width: int) -> Dense:
    file = f"{path}/config.json"
    reader = _read_object(checkpoint, file, required=True)
    name = reader.text("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    if name not in _DENSE_ACTIVATIONS:
        raise CheckpointError(f"activation_function {name!r} is not supported", file=file)
    return _checked(reader, width, path, bias=reader.flag("bias", default=True), activation=_DENSE_ACTIVATIONS[name])


def _checked(reader: ConfigReader, width: int, path: str, *, bias: bool, activation: DenseActivation) -> Dense:
    """A dense layer that takes what comes before it."""
    inputs, outputs = reader.size("in_features"), reader.size("out_features")
    if inputs != width:
        raise CheckpointError(f"in_features is {inputs}, and what comes before has {width}", file=reader.file)
    return Dense(path, inputs, outputs, bias, activation)


def _with_limits(checkpoint: Checkpoint, settings: EmbeddingSettings) -> EmbeddingSettings:
    """The same with what other files say: the longest text, lower case, and how far vectors may be cut."""
    transformer = ConfigReader({})
    for name in _TRANSFORMER_FILES:
        if _read_json(checkpoint, name) is not None:
            transformer = _read_object(checkpoint, name)
            break
    chain = _read_object(checkpoint, "config_sentence_transformers.json")
    if prompt := chain.text("default_prompt_name", ""):
        _log.warning("the default prompt %r is not put before texts: a parent sends what it wants embedded", prompt)
    widths = ConfigReader(checkpoint.config).sizes("matryoshka_dimensions") or ()
    longest, default = transformer.integer("max_seq_length", 0), chain.integer("truncate_dim", 0)
    return replace(
        settings,
        max_tokens=longest if longest > 0 else None,
        lower_case=transformer.flag("do_lower_case", default=False),
        default_width=default if 0 < default < settings.width else None,
        widths=widths,
    )


def _read_json(checkpoint: Checkpoint, name: str) -> JSON:
    raw = checkpoint.read(name)
    if raw is None:
        return None
    try:
        value: JSON = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", file=name) from error
    return value


def _read_object(checkpoint: Checkpoint, name: str, *, required: bool = False) -> ConfigReader:
    value = _read_json(checkpoint, name)
    if value is None and not required:
        return ConfigReader({}, name)
    if not isinstance(value, dict):
        raise CheckpointError("is missing or no JSON object", file=name)
    return ConfigReader(value, name)
