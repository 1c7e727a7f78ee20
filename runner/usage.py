"""The commands, flags and environment variables, as a user sees them; `runner.config` gives them their meaning."""

from collections.abc import Sequence
from dataclasses import replace

from runner.flags import Flag

PROGRAM = "ollama-mlx-runner"
PREFIX = "OLLAMA_MLX_RUNNER_"
CLASSIC_PORT = 8080
# As in models.store.policy, for the same reason.
QUANT_TYPES = ("int4", "int8", "nvfp4", "mxfp4", "mxfp8")

ENGINE_FLAGS = tuple(
    Flag(f"{dialect}-engine", "", f"speak {what}")
    for dialect, what in (
        ("mlx", "the protocol of Ollama's MLX runner (the default for a store name): load, then listen"),
        ("imagegen", "the protocol of Ollama's image runner: load, then listen"),
        ("ollama", "Ollama's classic protocol (the default for a path or none): listen, load on POST /load"),
    )
)
TUNING_FLAGS = (
    Flag(
        "weights",
        "POLICY",
        "auto, keep, float32, int8 or int4: weights as stored, widened, or quantised at load (auto: as stored)",
    ),
    Flag(
        "activations",
        "TYPE",
        "auto, int8 or float32: what products with quantised weights round their input to on a CPU (auto: int8)",
    ),
    Flag("executor", "NAME", "auto, onnx or mlx: what runs a text model (auto: mlx on a GPU, onnx on a CPU)"),
    Flag("threads", "N", "threads of the CPU's matrix products (default: chosen by the machine)"),
    Flag("context", "N", "tokens one request may hold, prompt and answer (default: what the model and memory allow)"),
    Flag("parallel", "N", "requests computed together (default 4)"),
    Flag("prefill-chunk", "N", "prompt tokens of one step (default 64 on a CPU, 512 on a GPU)"),
    Flag(
        "kv-cache-type",
        "TYPE",
        "f16, q8_0 or q4_0: how keys and values are held; q8_0 takes a third of the memory (default f16, unquantised)",
    ),
    Flag(
        "cache-bytes",
        "N",
        "bytes of keys and values kept for later prompts (default a quarter of what is free; 0: none)",
    ),
    Flag(
        "image-cache-bytes",
        "N",
        "bytes kept of what a text model made of pictures (default 256 MiB, or a 16th of what is free)",
    ),
    Flag("cache-dir", "DIR", "keep them there as well, so that they outlast the process (default: in memory alone)"),
    Flag("cache-dir-bytes", "N", "bytes that the files there may take, the longest unused going first (default 4 GiB)"),
    Flag("draft", "N", "guess up to N tokens ahead where a text repeats itself; its words stay the same (default 0)"),
    Flag(
        "strict-format",
        "",
        "refuse a JSON schema with keywords that cannot be enforced, instead of leaving these out (default false)",
    ),
    Flag(
        "pooling",
        "NAME",
        "cls, mean, last, max, mean_sqrt_len or weightedmean: serve embeddings, made so of a model's hidden states "
        "(default: as an embedding model says itself)",
    ),
    Flag(
        "lora",
        "FILE[=SCALE]",
        "merge a LoRA file into an image pipeline at load (default scale 1); give it again, or commas, for several",
        repeats=True,
    ),
    Flag(
        "text-encoder",
        "POLICY",
        "keep, free or auto: whether an image pipeline holds its text encoder between prompts (auto: if that fits)",
    ),
    Flag(
        "vae-tile",
        "N",
        "decode pictures of more than N x N latents piece by piece, which takes less memory (default 64; 0: none)",
    ),
    Flag("hostfile", "FILE", "share a text model with the machines of mlx.launch's hostfile (see DISTRIBUTED.md)"),
    Flag("shard", "HOW", "tensor or pipeline: each machine has a part of every layer, or some of the layers"),
    Flag("check-memory", "", "refuse a model or picture that is predicted not to fit (default true)"),
    Flag("verify-digests", "", "check the SHA-256 of blobs of the Ollama store while loading (default false)"),
    Flag("store", "DIR", "the Ollama store (default $OLLAMA_MODELS, then ~/.ollama/models)"),
    Flag("verbose", "", "log debug messages, as OLLAMA_DEBUG=1 does"),
)
RUNNER_FLAGS = (
    *ENGINE_FLAGS,
    Flag("model", "NAME", "a name in the Ollama store, a Hugging Face folder or a GGUF file"),
    Flag("port", "N", f"port to listen on (default {CLASSIC_PORT} for the classic protocol, else any free one)"),
    Flag("host", "ADDRESS", "address to listen on (default 127.0.0.1)"),
    *TUNING_FLAGS,
)
TRY_FLAGS = (
    Flag("model", "NAME", "a name in the Ollama store, a Hugging Face folder or a GGUF file (default: SmolLM2-135M)"),
    Flag("system", "TEXT", "the system message"),
    Flag("raw", "", "send the prompt as it is, without the model's chat template"),
    Flag("temperature", "T", "0 always takes the likeliest token (default 0)"),
    Flag("num-predict", "N", "at most that many tokens (default 256; -1: until the model ends)"),
    Flag("seed", "N", "the same seed draws the same answer"),
    Flag("input-image", "FILE", "a picture that the prompt is about; give it again for several", repeats=True),
    *TUNING_FLAGS,
)
TRY_IMAGE_FLAGS = (
    Flag("image", "", "make a picture; the flags above from --system to --num-predict are for text, those below not"),
    Flag("model", "NAME", "an image pipeline in the Ollama store, or its folder (default: the demonstration model)"),
    Flag("o", "FILE", "where the picture goes; several are numbered (default image.png)"),
    Flag("width", "N", "pixels (default: as the pipeline, or the first input picture, has it; --height likewise)"),
    Flag("height", "N", "pixels"),
    Flag("steps", "N", "denoising steps (default: as the pipeline has it)"),
    Flag("seed", "N", "the same seed makes the same picture"),
    Flag("guidance", "G", "how strongly the prompt is followed; 0 is off (default: as the pipeline has it)"),
    Flag("negative-prompt", "T", "what the picture shall not be like"),
    Flag("input-image", "FILE", "a picture to edit or to refer to; give it again for several", repeats=True),
    Flag("strength", "S", "how far an input picture is taken towards noise, 0 to 1"),
    Flag("format", "FORMAT", "png, jpeg or webp (default: by the file's name)"),
    Flag("n", "N", "make several pictures, each from the next seed"),
    Flag("step-cache", "T", "reuse a step whose input changed by less than that, such as 0.1 (default 0: never)"),
    *TUNING_FLAGS,
)
CREATE_FLAGS = (
    Flag("from", "PATH", "a Hugging Face folder, an image pipeline's folder, or a GGUF file"),
    Flag("quantize", "TYPE", f"{', '.join(QUANT_TYPES[:-1])} or {QUANT_TYPES[-1]} (default: weights stay as they are)"),
    Flag("template", "T", "a Go template for chats, or a file that holds one (default: found by the model)"),
    Flag("force", "", "replace a model of another format"),
    *(flag for flag in TUNING_FLAGS if flag.name in {"store", "verbose"}),
)
COMMANDS = (
    ("runner", "serve one model to a parent process (the word may be left out)"),
    ("try", 'start a runner as Ollama would, ask it one question and stop it: try "Why is the sky blue?"'),
    ("try --image", 'the same for a picture: try --image "a red circle on a white background" -o circle.png'),
    ("create", "write a model into an Ollama store: create NAME --from PATH"),
    ("fetch-default-model", "fetch the model that `try` uses by default, once"),
)


def with_variables(flags: Sequence[Flag]) -> tuple[Flag, ...]:
    """The flags that tune a runner may be given as OLLAMA_MLX_RUNNER_NAME, some also as Ollama's own."""
    tuning = {"host", *(flag.name for flag in TUNING_FLAGS)}
    others = {"store": ("OLLAMA_MODELS",), "kv-cache-type": ("OLLAMA_KV_CACHE_TYPE",)}
    return tuple(
        replace(flag, variables=(PREFIX + flag.name.upper().replace("-", "_"), *others.get(flag.name, ())))
        if flag.name in tuning
        else flag
        for flag in flags
    )


def help_text() -> str:
    """The commands, flags and environment variables."""
    lines = [f"usage: {PROGRAM} COMMAND [flags]", "", "commands:"]
    lines += [f"  {name:<22}{what}" for name, what in COMMANDS]
    own, own_image = (flags[: -len(TUNING_FLAGS)] for flags in (TRY_FLAGS, TRY_IMAGE_FLAGS))
    for title, flags in (
        ("runner", RUNNER_FLAGS),
        ("try", own),
        ("try --image", own_image),
        ("create", CREATE_FLAGS),
    ):
        lines += ["", f"flags of {title} (-x, --x, --x=VALUE and --x VALUE mean the same):"]
        for flag in with_variables(flags):
            lines.append(f"  {f'--{flag.name} {flag.metavar}'.rstrip():<22}{flag.help}")
            lines += [f"{'':<24}${' or $'.join(flag.variables)}"] if flag.variables else []
    lines += [
        f"`try` takes the flags from --weights on as well: {', '.join('--' + flag.name for flag in TUNING_FLAGS)}",
        "",
        "environment:",
        "  OLLAMA_DEBUG          1 or true logs debug messages, 2 traces",
        "  OLLAMA_MODELS         the Ollama store",
        f"  {PREFIX}CACHE  where the default model is kept",
        "",
    ]
    return "\n".join(lines)
