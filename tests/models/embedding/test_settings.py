"""What a checkpoint says of its vectors: read as written, or refused by name."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.checkpoint import open_checkpoint
from models.embedding import EmbeddingSettings, read_settings
from models.embedding.head import load_head
from models.embedding.settings import Dense
from models.errors import CheckpointError, UnsupportedArchitecture

TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}


@pytest.fixture
def bert(tiny_bert, tmp_path):
    """A copy of the tiny BERT, to be changed."""
    folder = tmp_path / "bert"
    shutil.copytree(tiny_bert, folder)
    return folder


def change(folder, name, value):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value))


def settings_of(folder, asked=None):
    return read_settings(open_checkpoint(str(folder), folder / "no-store"), asked)


def test_a_folder_of_sentence_transformers_is_read_as_written(bert):
    assert settings_of(bert) == EmbeddingSettings("mean", 24, normalize=True, max_tokens=64)


def test_without_modules_an_encoder_is_pooled_by_its_mean_and_normalised(parity_embedding):
    assert settings_of(parity_embedding / "bert_plain") == EmbeddingSettings("mean", 24, normalize=True)


def test_a_model_of_words_makes_no_embeddings_unless_it_is_asked(tiny_llama):
    assert settings_of(tiny_llama) is None
    assert settings_of(tiny_llama, "mean") == EmbeddingSettings("mean", 32, normalize=True)


def test_who_asks_for_a_pooling_overrules_the_folder(bert):
    assert settings_of(bert, "cls") == replace(settings_of(bert), pooling="cls")


@pytest.mark.parametrize(
    ("key", "pooling"),
    [
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_lasttoken", "last"),
        ("pooling_mode_weightedmean_tokens", "weightedmean"),
    ],
)
def test_the_pooling_is_the_one_mode_that_is_set(bert, key, pooling):
    change(bert, "1_Pooling/config.json", {"word_embedding_dimension": 24, key: True})
    assert settings_of(bert).pooling == pooling
    change(bert, "1_Pooling/config.json", {"pooling_mode": key.removeprefix("pooling_mode_").removesuffix("_tokens")})
    if pooling != "cls":
        assert settings_of(bert).pooling == pooling


def test_dense_layers_limits_and_case_are_read(bert):
    change(bert, "modules.json", [TRANSFORMER, POOLING, DENSE])
    change(bert, "2_Dense/config.json", {"in_features": 24, "out_features": 5, "bias": False})
    change(bert, "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": True})
    change(bert, "config_sentence_transformers.json", {"truncate_dim": 3})
    config = json.loads((bert / "config.json").read_text())
    change(bert, "config.json", config | {"matryoshka_dimensions": [2, 3]})
    dense = Dense("2_Dense", 24, 5, bias=False, activation="tanh")
    assert settings_of(bert) == EmbeddingSettings(
        "mean", 5, False, (dense,), max_tokens=9, lower_case=True, default_width=3, widths=(2, 3)
    )


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({"a": 1}, "is no list of modules"),
        ([TRANSFORMER, 7], "a module is malformed"),
        ([TRANSFORMER], "there is no module Pooling"),
        ([TRANSFORMER, POOLING, {"type": "x.LayerNorm", "path": ""}], "the module 'LayerNorm' is not supported"),
        ([TRANSFORMER, NORMALIZE, POOLING], "the module 'Pooling' is not supported where it stands"),
        ([TRANSFORMER | {"path": "0_Transformer"}, POOLING], "the transformer lies in the folder '0_Transformer'"),
        ([TRANSFORMER, POOLING | {"path": "elsewhere"}], "elsewhere/config.json: is missing or no JSON object"),
    ],
)
def test_a_chain_of_other_modules_is_refused_by_name(bert, modules, reason):
    change(bert, "modules.json", modules)
    with pytest.raises(CheckpointError, match=reason):
        settings_of(bert)


@pytest.mark.parametrize(
    ("pooling", "reason"),
    [
        ({}, "0 pooling modes are set"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "2 pooling modes are set"),
        ({"pooling_mode": "attention"}, "pooling_mode 'attention' is not supported"),
        ({"pooling_mode": "mean", "word_embedding_dimension": 7}, "word_embedding_dimension is 7"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt false is not supported"),
    ],
)
def test_a_pooling_that_is_not_honoured_is_refused_by_name(bert, pooling, reason):
    change(bert, "1_Pooling/config.json", pooling)
    with pytest.raises(CheckpointError, match=reason):
        settings_of(bert)


@pytest.mark.parametrize(
    ("dense", "reason"),
    [
        ({"in_features": 23, "out_features": 5}, "in_features is 23, and what comes before has 24"),
        ({"in_features": 24, "out_features": 5, "activation_function": "x.Mish"}, "activation_function 'Mish'"),
    ],
)
def test_a_dense_layer_that_does_not_fit_is_refused(bert, dense, reason):
    change(bert, "modules.json", [TRANSFORMER, POOLING, DENSE])
    change(bert, "2_Dense/config.json", dense)
    with pytest.raises(CheckpointError, match=reason):
        settings_of(bert)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [({}, "linear.weight: is missing"), ({"linear.weight": np.zeros((5, 23), np.float32)}, r"its shape is \[5, 23\]")],
)
def test_dense_weights_that_do_not_fit_are_refused(bert, weight, reason):
    change(bert, "modules.json", [TRANSFORMER, POOLING, DENSE])
    change(bert, "2_Dense/config.json", {"in_features": 24, "out_features": 5, "bias": False})
    save_file({"other": np.zeros(1, np.float32)} | weight, bert / "2_Dense" / "model.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        load_head(open_checkpoint(str(bert), bert), settings_of(bert))


def test_a_file_that_is_no_json_is_refused(bert):
    (bert / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"modules\.json: is not JSON"):
        settings_of(bert)


def test_an_unknown_architecture_with_modules_is_refused(bert):
    change(bert, "config.json", {"architectures": ["T5EncoderModel"]})
    with pytest.raises(UnsupportedArchitecture, match="T5Encoder"):
        settings_of(bert)


def test_gguf_files_say_their_pooling_and_a_nomic_bert_is_not_normalised(parity_embedding):
    assert settings_of(parity_embedding / "bert.gguf") == EmbeddingSettings("mean", 24, normalize=True)
    assert settings_of(parity_embedding / "nomic_bert.gguf") == EmbeddingSettings("mean", 24, normalize=False)
    assert settings_of(parity_embedding / "qwen3_embedding.gguf") == EmbeddingSettings("last", 24, normalize=True)


def test_the_dense_layers_of_an_embedding_gemmas_gguf_file_follow_its_pooling(parity_embedding):
    path = parity_embedding / "embedding_gemma.gguf"
    layers = (Dense("dense_2", 24, 28, False, "identity"), Dense("dense_3", 28, 20, False, "identity"))
    settings = settings_of(path)
    assert settings == EmbeddingSettings("mean", 20, normalize=True, dense=layers)
    checkpoint = open_checkpoint(str(path), path.parent)
    assert [layer.weight.shape for layer in load_head(checkpoint, settings).layers] == [(28, 24), (20, 28)]
    with pytest.raises(CheckpointError, match="has no component 'dense_4'"):
        load_head(checkpoint, replace(settings, dense=(replace(layers[0], component="dense_4"),)))


def test_a_model_of_the_ollama_store_embeds_by_its_capability(store_writer, tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text())
    store_writer.json("config.json", config)
    store_writer.tensors("model.norm.weight", {})
    store_writer.manifest(config={"capabilities": ["embedding"]})
    found = read_settings(open_checkpoint("tiny", store_writer.store))
    assert found == EmbeddingSettings("last", 32, normalize=True)
