"""argv and environment to configuration."""

from pathlib import Path
from typing import get_args

import pytest

from models.executors.onnx import forms, slabs
from models.image.base import LoadChoices
from models.quantization import WeightPolicy
from runner.config import (
    ACTIVATIONS,
    CACHE_TYPES,
    EXECUTORS,
    WEIGHT_POLICIES,
    DialectName,
    FetchConfig,
    HelpCommand,
    LoraFile,
    RunnerConfig,
    TryConfig,
    VersionCommand,
    from_args,
    parse,
)
from runner.flags import UsageError
from runner.folders import cache_folder

HOME = {"HOME": "/home/somebody"}
OTHER_VALUES = {
    "WEIGHTS": "float32",
    "ACTIVATIONS": "int8",
    "EXECUTOR": "mlx",
    "STORE": "/other",
    "HOST": "0.0.0.0",
    "TEXT_ENCODER": "keep",
    "VAE_TILE": "32",
}


@pytest.mark.parametrize(
    ("argv", "dialect", "model", "port"),
    [
        ("runner --imagegen-engine --model z-image --port 5001", DialectName.IMAGEGEN, "z-image", 5001),
        ("runner --mlx-engine --model qwen3:4b --port 5002", DialectName.MLX, "qwen3:4b", 5002),
        ("runner --ollama-engine --model /blobs/sha256-00 --port 5003", DialectName.CLASSIC, "/blobs/sha256-00", 5003),
        ("runner --ollama-engine --port 5004", DialectName.CLASSIC, None, 5004),
        ("runner --model /blobs/sha256-00 --port 5005", DialectName.CLASSIC, "/blobs/sha256-00", 5005),
        ("runner --model somebody/m:7b --port 5006", DialectName.MLX, "somebody/m:7b", 5006),
    ],
)
def test_every_command_line_that_ollama_writes_is_understood(argv, dialect, model, port):
    config = from_args(argv.split(), HOME)
    assert (config.dialect, config.model, config.port) == (dialect, model, port)


@pytest.mark.parametrize("argv", ["-model x -port 7", "--model=x --port=7", "--model x --port 7", "-model=x --port 7"])
def test_all_forms_of_a_go_flag_mean_the_same_and_the_word_runner_may_be_absent(argv):
    assert from_args(argv.split(), HOME) == from_args(["runner", *argv.split()], HOME)
    assert from_args(argv.split(), HOME).model == "x"
    assert from_args(argv.split(), HOME).port == 7


def test_a_switch_takes_a_value_only_after_an_equals_sign():
    assert from_args(["--check-memory=false"], HOME).check_memory is False
    with pytest.raises(UsageError, match='unexpected argument "false"'):
        from_args(["--check-memory", "false"], HOME)


def test_the_last_of_two_values_wins():
    assert from_args(["--port", "1", "--port", "2"], HOME).port == 2


def test_a_classic_runner_without_flags_takes_ollamas_defaults():
    config = from_args(["runner"], HOME)
    assert config == RunnerConfig(
        dialect=DialectName.CLASSIC, model=None, port=8080, store=Path("/home/somebody/.ollama/models")
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--mlx-engine", "--mlx-engine needs a model: add --model NAME"),
        ("--imagegen-engine --model=", "--imagegen-engine needs a model: add --model NAME"),
        ("--mlx-engine --ollama-engine", "--mlx-engine and --ollama-engine exclude each other; give one"),
        ("--port", "--port needs a value: --port N"),
        ("--port abc", '--port must be a whole number, not "abc"'),
        ("--port 65536", "--port must be at most 65535, not 65536"),
        ("--port -1", "--port must be at least 0, not -1"),
        ("--context 0", "--context must be at least 1, not 0"),
        ("--verbose=perhaps", '--verbose must be true or false, not "perhaps"'),
        ("--weights q4", '--weights must be one of auto, float32, keep, int8, int4, not "q4"'),
        ("--activations int4", '--activations must be one of auto, int8, float32, not "int4"'),
        ("--executor cuda", '--executor must be one of auto, onnx, mlx, not "cuda"'),
        ("--vae-tile -1", "--vae-tile must be at least 0, not -1"),
        ("--text-encoder no", '--text-encoder must be one of keep, free, auto, not "no"'),
        ("--lora a.safetensors=inf", 'the scale of --lora a.safetensors must be a finite number, not "inf"'),
        ("--gpu-layers 5", "unknown flag --gpu-layers; --help lists the flags"),
        ("--port 1 qwen3", 'unexpected argument "qwen3"; a model is given as --model qwen3'),
        ("serve", 'unknown command "serve"; the commands are runner, try, create, fetch-default-model'),
        ("try", 'try needs a prompt: try "Name the capital of France."'),
        ("try hello --temperature nan", "--temperature must be a number of at least 0, not nan"),
        ("fetch-default-model now", 'fetch-default-model takes no arguments, not "now"'),
    ],
)
def test_what_is_wrong_is_named_with_what_to_write_instead(argv, message):
    with pytest.raises(UsageError) as caught:
        parse(argv.split(), HOME)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("WEIGHTS", "keep", "weights", "keep"),
        ("WEIGHTS", "int4", "weights", "int4"),
        ("ACTIVATIONS", "float32", "activations", "float32"),
        ("EXECUTOR", "onnx", "executor", "onnx"),
        ("THREADS", "3", "threads", 3),
        ("CONTEXT", "4096", "context", 4096),
        ("PARALLEL", "2", "parallel", 2),
        ("PREFILL_CHUNK", "64", "prefill_chunk", 64),
        ("DRAFT", "8", "draft", 8),
        ("IMAGE_CACHE_BYTES", "0", "image_cache_bytes", 0),
        ("LORA", "/a.safetensors=0.5", "loras", (LoraFile(Path("/a.safetensors"), 0.5),)),
        ("TEXT_ENCODER", "free", "text_encoder", "free"),
        ("VAE_TILE", "0", "vae_tile", 0),
        ("CHECK_MEMORY", "0", "check_memory", False),
        ("VERIFY_DIGESTS", "true", "verify_digests", True),
        ("STORE", "/store", "store", Path("/store")),
        ("HOST", "::1", "host", "::1"),
        ("VERBOSE", "1", "debug", 1),
    ],
)
def test_each_setting_may_come_from_the_environment_and_the_flag_is_stronger(variable, text, field, value):
    environ = HOME | {f"OLLAMA_MLX_RUNNER_{variable}": text}
    assert getattr(from_args([], environ), field) == value
    flag = "--" + variable.lower().replace("_", "-")
    assert getattr(from_args([f"{flag}={text}"], HOME), field) == value
    other = OTHER_VALUES.get(variable, "1")
    assert from_args([f"{flag}={other}"], environ) == from_args([f"{flag}={other}"], HOME)


def test_a_bad_value_in_the_environment_is_blamed_on_its_variable():
    with pytest.raises(UsageError, match=r"^OLLAMA_MLX_RUNNER_THREADS must be at least 1, not 0$"):
        from_args([], HOME | {"OLLAMA_MLX_RUNNER_THREADS": "0"})


def test_ollamas_store_variable_is_honoured_quotes_and_blanks_apart():
    assert from_args([], HOME | {"OLLAMA_MODELS": ' "/my models" '}).store == Path("/my models")
    assert from_args([], HOME | {"OLLAMA_MODELS": ""}).store == Path("/home/somebody/.ollama/models")
    own = HOME | {"OLLAMA_MODELS": "/theirs", "OLLAMA_MLX_RUNNER_STORE": "/ours"}
    assert from_args([], own).store == Path("/ours")


def test_verbose_never_lowers_the_level():
    assert from_args(["--verbose"], HOME | {"OLLAMA_DEBUG": "2"}).debug == 2
    assert from_args(["--verbose"], HOME).debug == 1


@pytest.mark.parametrize(
    "argv",
    [
        "--lora a.safetensors --lora b=c.safetensors=-0.5 --lora=d=1e-1",
        "--lora=a.safetensors,b=c.safetensors=-0.5,d=.1,",
    ],
)
def test_lora_files_come_one_by_one_or_with_commas_in_the_order_given(argv):
    assert from_args(argv.split(), HOME).loras == (
        LoraFile(Path("a.safetensors"), 1.0),
        LoraFile(Path("b=c.safetensors"), -0.5),
        LoraFile(Path("d"), 0.1),
    )


def test_a_lora_file_may_begin_with_a_tilde_behind_an_equals_sign():
    assert from_args(["--lora=~/a.safetensors"], HOME).loras == (LoraFile(Path("/home/somebody/a.safetensors")),)
    assert from_args([], HOME).loras == ()


def test_the_tiles_of_the_autoencoder_are_as_large_as_the_models_package_has_them():
    assert from_args([], HOME).vae_tile == LoadChoices().vae_tile


def test_the_weight_policies_are_those_of_the_models_package():
    assert {"auto", *get_args(forms.WeightChoice)} == set(WEIGHT_POLICIES)
    # A pipeline and a language model on MLX know two of them.
    assert set(get_args(WeightPolicy)) - {"auto"} == {"float32", "keep"}


def test_the_activations_are_those_of_the_models_package():
    assert {"auto", *get_args(forms.Activations)} == set(ACTIVATIONS)


def test_what_runs_a_text_model_is_chosen_by_the_device_unless_a_flag_says_it():
    assert from_args([], HOME).executor == "auto"
    assert [from_args([f"--executor={name}"], HOME).executor for name in EXECUTORS] == ["auto", "onnx", "mlx"]


def test_a_prompt_may_stand_before_between_and_after_the_flags_of_try():
    config = parse(["try", "Why", "--temperature", "0.5", "is it", "--weights=keep", "--", "--blue?"], HOME)
    assert isinstance(config, TryConfig)
    assert config.prompt == "Why is it --blue?"
    assert config.temperature == 0.5
    assert config.runner_flags == ("--weights=keep",)


def test_try_may_be_asked_about_pictures():
    config = parse(["try", "--input-image", "a.png", "what", "--input-image=b.png", "is this?"], HOME)
    assert isinstance(config, TryConfig)
    assert (config.prompt, config.images) == ("what is this?", (Path("a.png"), Path("b.png")))
    assert config.runner_flags == ()
    plain = parse(["try", "x"], HOME)
    assert isinstance(plain, TryConfig)
    assert plain.images == ()


def test_what_try_passes_on_is_understood_by_the_runner():
    config = parse(["try", "x", "-threads", "2", "-check-memory=false", "-verbose"], HOME)
    assert isinstance(config, TryConfig)
    child = from_args(["runner", *config.runner_flags], HOME)
    assert (child.threads, child.check_memory, child.debug) == (2, False, 1)


def test_help_names_every_setting_of_the_runner_and_its_variable():
    command = parse(["runner", "--help"], HOME)
    assert isinstance(command, HelpCommand)
    for name in (
        "store",
        "host",
        "weights",
        "activations",
        "executor",
        "threads",
        "context",
        "parallel",
        "prefill-chunk",
        "draft",
        "image-cache-bytes",
        "lora",
        "text-encoder",
        "vae-tile",
        "check-memory",
    ):
        assert f"--{name}" in command.text
        assert "OLLAMA_MLX_RUNNER_" + name.upper().replace("-", "_") in command.text


@pytest.mark.parametrize("argv", [[], ["help"], ["-h"], ["--help"], ["try", "-help"]])
def test_help_is_shown_to_whoever_asks_or_says_nothing(argv):
    assert isinstance(parse(argv, HOME), HelpCommand)


def test_the_word_help_can_be_asked_about():
    assert isinstance(parse(["try", "--", "--help"], HOME), TryConfig)


def test_the_version_can_be_asked_for():
    assert isinstance(parse(["--version"], HOME), VersionCommand)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        (HOME, "/home/somebody/.cache/ollama-mlx-runner"),
        (HOME | {"XDG_CACHE_HOME": "/xdg"}, "/xdg/ollama-mlx-runner"),
        (HOME | {"XDG_CACHE_HOME": "/xdg", "OLLAMA_MLX_RUNNER_CACHE": "/own"}, "/own"),
    ],
)
def test_the_cache_folder_follows_the_users_wishes(environ, folder):
    assert cache_folder(environ) == Path(folder)
    assert parse(["fetch-default-model"], environ) == FetchConfig(Path(folder))


def test_the_folder_of_the_prefix_cache_is_off_unless_named():
    assert from_args([], HOME).cache_dir is None
    assert from_args([], HOME).cache_dir_bytes == 4 << 30
    config = from_args(["--cache-dir", "/var/x", "--cache-dir-bytes", str(1 << 40)], HOME)
    assert (config.cache_dir, config.cache_dir_bytes) == (Path("/var/x"), 1 << 40)
    config = from_args([], {**HOME, "OLLAMA_MLX_RUNNER_CACHE_DIR": "~/kept"})
    assert config.cache_dir == Path("/home/somebody/kept")


def test_the_kind_of_cache_is_ollamas_unless_a_flag_says_it():
    assert get_args(slabs.CacheType) == CACHE_TYPES
    assert from_args([], HOME).kv_cache_type == "f16"
    assert from_args([], {**HOME, "OLLAMA_KV_CACHE_TYPE": "q8_0"}).kv_cache_type == "q8_0"
    assert from_args(["--kv-cache-type=q4_0"], {**HOME, "OLLAMA_KV_CACHE_TYPE": "q8_0"}).kv_cache_type == "q4_0"
    with pytest.raises(UsageError, match="--kv-cache-type must be one of f16, q8_0, q4_0"):
        from_args(["--kv-cache-type", "q5_1"], HOME)
