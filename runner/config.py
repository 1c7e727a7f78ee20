"""The configuration of the process: this module alone reads argv and the environment.

`parse` turns them into one frozen value per command; what a value means is the business of whoever receives it. A flag
comes before its environment variable, which comes before the default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from runner.flags import Settings, UsageError, Value, debug_level, parse_flags
from runner.folders import cache_folder, folder_of, path_of, store_folder
from runner.image_flags import PictureFlags, picture_flags
from runner.rank_flags import ALONE, RankConfig, RanksConfig, rank_config, rank_flags
from runner.usage import (
    CLASSIC_PORT,
    COMMANDS,
    CREATE_FLAGS,
    QUANT_TYPES,
    RUNNER_FLAGS,
    TRY_FLAGS,
    TRY_IMAGE_FLAGS,
    TUNING_FLAGS,
    help_text,
    with_variables,
)

LOOPBACK = "127.0.0.1"
WeightChoice: TypeAlias = Literal["auto", "float32", "keep", "int8", "int4"]
"""How weights are held: as stored, widened, or quantised at load."""
Activations: TypeAlias = Literal["auto", "int8", "float32"]
"""What a product with quantised weights rounds its input to; auto is int8."""
ExecutorName: TypeAlias = Literal["auto", "onnx", "mlx"]
"""What runs a text model; auto is mlx on a GPU and onnx elsewhere."""
CacheType: TypeAlias = Literal["f16", "q8_0", "q4_0"]
PoolingChoice: TypeAlias = Literal["cls", "mean", "last", "max", "mean_sqrt_len", "weightedmean"]
"""As `models.embedding.Pooling`, which this module does not import."""
TextEncoderPolicy: TypeAlias = Literal["keep", "free", "auto"]
"""Whether an image pipeline holds its text encoder between prompts."""
MAX_DRAFT = 64
MAX_BYTES = 2**60
CACHE_DIR_BYTES = 4 << 30
WEIGHT_POLICIES: tuple[str, ...] = get_args(WeightChoice)
ACTIVATIONS: tuple[str, ...] = get_args(Activations)
EXECUTORS: tuple[str, ...] = get_args(ExecutorName)
CACHE_TYPES: tuple[CacheType, ...] = get_args(CacheType)
POOLINGS: tuple[str, ...] = get_args(PoolingChoice)
TEXT_ENCODER_POLICIES: tuple[str, ...] = get_args(TextEncoderPolicy)
VAE_TILE = 64


class DialectName(Enum):
    """The launch flag that chose how the parent speaks."""

    IMAGEGEN = "imagegen"
    MLX = "mlx"
    CLASSIC = "ollama"


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file to merge into an image pipeline, and its strength."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Everything the process was told at launch."""

    dialect: DialectName
    model: str | None
    """A store name, a folder or a GGUF file. None only for the classic dialect, where POST /load may follow."""
    port: int
    """0 lets the system choose; the log line "listening" says which."""
    store: Path
    host: str = LOOPBACK
    debug: int = 0
    """0 info, 1 debug, 2 trace: OLLAMA_DEBUG."""
    weights: WeightChoice = "auto"
    activations: Activations = "auto"
    executor: ExecutorName = "auto"
    threads: int | None = None
    """Threads of the CPU's products; None is a thread a core."""
    context: int | None = None
    """Tokens one row may hold; None is the model's own limit."""
    parallel: int = 4
    """Rows in the batch."""
    prefill_chunk: int | None = None
    """Prompt tokens of one step; None is 64 on a CPU, which hardly gains from more, and 512 on a GPU."""
    kv_cache_type: CacheType = "f16"
    """How keys and values are held, unless a classic parent says it; f16 is as the model computes."""
    cache_bytes: int | None = None
    """What the prefix cache may hold; None is a quarter of the memory that the model leaves free, 0 is nothing."""
    image_cache_bytes: int | None = None
    """What is kept of the pictures in requests; None is 256 MiB, or a 16th of what the model leaves free."""
    cache_dir: Path | None = None
    """Where the prefix cache is kept for the next process; None keeps it in memory alone."""
    cache_dir_bytes: int = CACHE_DIR_BYTES
    """What the files there may take."""
    draft: int = 0
    """Tokens a row may draft at once from its own text; 0 is off."""
    strict_format: bool = False
    """Refuse a schema that cannot be enforced whole, instead of enforcing what can be."""
    pooling: PoolingChoice | None = None
    """Serve embeddings, made so of the hidden states; None: as the checkpoint says, and a model of words says words."""
    loras: tuple[LoraFile, ...] = ()
    text_encoder: TextEncoderPolicy = "auto"
    vae_tile: int = VAE_TILE
    """A picture of more latents than a square of this side is decoded piece by piece; 0: none is."""
    check_memory: bool = True
    verify_digests: bool = False
    ranks: RanksConfig = ALONE


@dataclass(frozen=True, slots=True)
class TryConfig:
    """The `try` command: one prompt through a child process, as Ollama would do it."""

    prompt: str
    model: str | None
    """None is the embedded default model."""
    system: str | None
    raw: bool
    """Send the prompt as it is, without the model's chat template."""
    temperature: float
    num_predict: int
    """-1: until the model ends its answer."""
    seed: int | None
    images: tuple[Path, ...]
    """Pictures that the prompt is about."""
    cache: Path
    runner: RunnerConfig
    """What the child is told, but for port and model."""
    runner_flags: tuple[str, ...]
    """The flags that say so."""


@dataclass(frozen=True, slots=True)
class TryImageConfig:
    """The `try --image` command: a picture or several through a child process."""

    prompt: str
    model: str | None
    """None is the embedded demonstration model."""
    picture: PictureFlags
    runner: RunnerConfig
    """What the child is told, but for port and model."""
    runner_flags: tuple[str, ...]
    """The flags that say so."""


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """The `fetch-default-model` command."""

    cache: Path


@dataclass(frozen=True, slots=True)
class CreateConfig:
    """The `create` command: a model from files into an Ollama store."""

    name: str
    source: Path
    quantize: str | None
    """None keeps the weights as they are."""
    template: str | None
    """A Go template or the name of a file that holds one; None finds one for the model."""
    force: bool
    """Replace a model of another format."""
    store: Path
    debug: int = 0


@dataclass(frozen=True, slots=True)
class VersionCommand:
    """The `--version` flag."""


@dataclass(frozen=True, slots=True)
class HelpCommand:
    """The `--help` flag, with what it shows."""

    text: str


Command: TypeAlias = (
    RunnerConfig | RankConfig | TryConfig | TryImageConfig | FetchConfig | CreateConfig | VersionCommand | HelpCommand
)


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Command:
    """The command that argv (without the program's name) and the environment ask for.

    Raises:
        UsageError: they make no sense; the message says what to write instead.
    """
    if not argv or argv[0] == "help":
        return HelpCommand(help_text())
    if any(argument in {"-h", "-help", "--help"} for argument in _before_words_end(argv)):
        return HelpCommand(help_text())
    if argv[0] in {"version", "-version", "--version"}:
        return VersionCommand()
    return _command_of_word(argv, environ)


def _command_of_word(argv: Sequence[str], environ: Mapping[str, str]) -> Command:
    match argv[0]:
        case "try" if {"-image", "--image"} & set(_before_words_end(argv)):
            return _try_image_config(argv[1:], environ)
        case "try":
            return _try_config(argv[1:], environ)
        case "rank":
            return rank_config(environ)
        case "create":
            return _create_config(argv[1:], environ)
        case "fetch-default-model":
            if argv[1:]:
                raise UsageError(f'fetch-default-model takes no arguments, not "{argv[1]}"')
            return FetchConfig(cache_folder(environ))
        case word if word != "runner" and not word.startswith("-"):
            names = ", ".join(name for name, _ in COMMANDS if " " not in name)
            raise UsageError(f'unknown command "{word}"; the commands are {names}')
        case _:
            return from_args(argv, environ)


def from_args(argv: Sequence[str], environ: Mapping[str, str]) -> RunnerConfig:
    """The configuration of a runner; argv is what Ollama passes, with or without the word `runner`.

    Raises:
        UsageError: an unknown flag, a bad value, or no model where the dialect needs one.
    """
    flags = with_variables(RUNNER_FLAGS)
    values, words = parse_flags(argv[1:] if argv and argv[0] == "runner" else argv, flags)
    if words:
        raise UsageError(f'unexpected argument "{words[0]}"; a model is given as --model {words[0]}')
    settings = Settings(values, flags, environ)
    dialect = _dialect(settings)
    config = _runner_config(settings, environ, dialect)
    if config.model is None and dialect is not DialectName.CLASSIC:
        raise UsageError(f"--{dialect.value}-engine needs a model: add --model NAME")
    return config


def _dialect(settings: Settings) -> DialectName:
    chosen = [dialect for dialect in DialectName if settings.boolean(f"{dialect.value}-engine", default=False)]
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0].value}-engine and --{chosen[1].value}-engine exclude each other; give one")
    if chosen:
        return chosen[0]
    # Ollama to v0.24 starts its classic runners, Ollama from v0.34.2 its MLX runner without a flag. The former name a
    # blob by its absolute path, the latter a model of the store.
    model = settings.text("model")
    return DialectName.CLASSIC if model is None or Path(model).is_absolute() else DialectName.MLX


def _runner_config(settings: Settings, environ: Mapping[str, str], dialect: DialectName) -> RunnerConfig:
    port = settings.integer("port", least=0, most=65535)
    if port is None:
        port = CLASSIC_PORT if dialect is DialectName.CLASSIC else 0
    cache_dir_bytes = settings.integer("cache-dir-bytes", least=0, most=MAX_BYTES)
    vae_tile = settings.integer("vae-tile", least=0)
    return RunnerConfig(
        dialect=dialect,
        model=settings.text("model"),
        port=port,
        store=store_folder(settings.text("store"), environ),
        host=settings.text("host") or LOOPBACK,
        debug=_debug(settings, environ),
        weights=cast("WeightChoice", settings.choice("weights", WEIGHT_POLICIES) or "auto"),
        activations=cast("Activations", settings.choice("activations", ACTIVATIONS) or "auto"),
        executor=cast("ExecutorName", settings.choice("executor", EXECUTORS) or "auto"),
        threads=settings.integer("threads", least=1, most=1024),
        context=settings.integer("context", least=1),
        parallel=settings.integer("parallel", least=1, most=1024) or 4,
        prefill_chunk=settings.integer("prefill-chunk", least=1),
        kv_cache_type=cast("CacheType", settings.choice("kv-cache-type", CACHE_TYPES) or "f16"),
        cache_bytes=settings.integer("cache-bytes", least=0, most=MAX_BYTES),
        image_cache_bytes=settings.integer("image-cache-bytes", least=0, most=MAX_BYTES),
        cache_dir=folder_of(settings.text("cache-dir"), environ),
        cache_dir_bytes=CACHE_DIR_BYTES if cache_dir_bytes is None else cache_dir_bytes,
        draft=settings.integer("draft", least=0, most=MAX_DRAFT) or 0,
        strict_format=settings.boolean("strict-format", default=False),
        pooling=cast("PoolingChoice | None", settings.choice("pooling", POOLINGS)),
        loras=tuple(_lora(text, environ) for text in settings.texts("lora")),
        text_encoder=cast("TextEncoderPolicy", settings.choice("text-encoder", TEXT_ENCODER_POLICIES) or "auto"),
        vae_tile=VAE_TILE if vae_tile is None else vae_tile,
        check_memory=settings.boolean("check-memory", default=True),
        verify_digests=settings.boolean("verify-digests", default=False),
        ranks=rank_flags(settings, environ, folder_of(settings.text("hostfile"), environ)),
    )


def _lora(text: str, environ: Mapping[str, str]) -> LoraFile:
    """FILE or FILE=SCALE; a file's own name may have an equals sign in it."""
    name, _, end = text.rpartition("=")
    try:
        scale = float(end) if name else None
    except ValueError:
        scale = None
    if scale is None:
        return LoraFile(path_of(text, environ))
    if not isfinite(scale):
        raise UsageError(f'the scale of --lora {name} must be a finite number, not "{end}"')
    return LoraFile(path_of(name, environ), scale)


def _try_config(argv: Sequence[str], environ: Mapping[str, str]) -> TryConfig:
    flags = with_variables(TRY_FLAGS)
    values, words = parse_flags(argv, flags, interspersed=True)
    prompt = " ".join(words)
    if not prompt:
        raise UsageError('try needs a prompt: try "Name the capital of France."')
    settings = Settings(values, flags, environ)
    temperature = settings.number("temperature", least=0)
    num_predict = settings.integer("num-predict", least=-1)
    return TryConfig(
        prompt=prompt,
        model=settings.text("model"),
        system=settings.text("system"),
        raw=settings.boolean("raw", default=False),
        temperature=0.0 if temperature is None else temperature,
        num_predict=256 if num_predict is None else num_predict,
        seed=settings.integer("seed", least=0),
        images=tuple(Path(text) for text in settings.texts("input-image")),
        cache=cache_folder(environ),
        runner=_runner_config(settings, environ, DialectName.CLASSIC),
        runner_flags=_pass_on(values),
    )


def _try_image_config(argv: Sequence[str], environ: Mapping[str, str]) -> TryImageConfig:
    flags = with_variables(TRY_IMAGE_FLAGS)
    values, words = parse_flags(argv, flags, interspersed=True)
    if not words:
        raise UsageError('try --image needs a prompt: try --image "a red circle on a white background"')
    settings = Settings(values, flags, environ)
    return TryImageConfig(
        prompt=" ".join(words),
        model=settings.text("model"),
        picture=picture_flags(settings),
        runner=_runner_config(settings, environ, DialectName.IMAGEGEN),
        runner_flags=_pass_on(values),
    )


def _create_config(argv: Sequence[str], environ: Mapping[str, str]) -> CreateConfig:
    flags = with_variables(CREATE_FLAGS)
    values, words = parse_flags(argv, flags, interspersed=True)
    settings = Settings(values, flags, environ)
    source = settings.text("from")
    if len(words) != 1 or source is None:
        raise UsageError("create needs one name and where from: create NAME --from FOLDER|FILE.gguf")
    return CreateConfig(
        name=words[0],
        source=Path(source),
        quantize=settings.choice("quantize", QUANT_TYPES),
        template=settings.text("template"),
        force=settings.boolean("force", default=False),
        store=store_folder(settings.text("store"), environ),
        debug=_debug(settings, environ),
    )


def _debug(settings: Settings, environ: Mapping[str, str]) -> int:
    verbose = settings.boolean("verbose", default=False)
    return max(debug_level(environ), 1) if verbose else debug_level(environ)


def _pass_on(values: Mapping[str, Value]) -> tuple[str, ...]:
    names = {flag.name for flag in TUNING_FLAGS}
    return tuple(f"--{name}={value.text}" for name, value in values.items() if name in names)


def _before_words_end(argv: Sequence[str]) -> Sequence[str]:
    """The arguments before `--`."""
    return argv[: argv.index("--")] if "--" in argv else argv
