"""The `try` command: one question to a model, through a child process that is treated as Ollama would treat it.

Owns what a person sees: progress while fetching and loading, the answer as it comes (on stdout, everything else on
stderr), one line of figures. The child is of the classic dialect, the only one that tells how far its load is.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from runner import default_model
from runner.config import DialectName, TryConfig
from runner.parent import JSON, Child, ChildError, Piece, spawn
from runner.progress_bar import ProgressBar

SHOWN_VALUES = 8


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured. Durations in seconds, of the child's own counting where it counts."""

    load_s: float
    first_token_s: float
    last: Piece
    peak_bytes: int | None

    def line(self) -> str:
        """The line a person reads."""
        parts = [
            f"load {self.load_s:.2f} s",
            f"prompt {self.last.prompt_tokens} tokens {_rate(self.last.prompt_tokens, self.last.prompt_ns)}",
            f"first token {self.first_token_s:.2f} s",
            f"decode {self.last.eval_tokens} tokens {_rate(self.last.eval_tokens, self.last.eval_ns)}",
        ]
        if self.peak_bytes is not None:
            parts.append(f"peak memory {self.peak_bytes / 2**20:.0f} MiB")
        return " | ".join(parts)


def _rate(tokens: int, duration_ns: int) -> str:
    return f"({tokens / duration_ns * 1e9:.1f} tok/s)" if duration_ns > 0 else "(no time)"


def fetch_with_progress(cache: Path) -> Path:
    """The default model's file, fetched under a bar if need be.

    Raises:
        FetchError: it cannot be fetched.
    """
    if file := default_model.cached(cache):
        return file
    bar = ProgressBar(f"fetching {default_model.DEFAULT_MODEL.filename}")
    file = default_model.fetch(cache, bar.show)
    bar.finish()
    return file


def run(config: TryConfig) -> int:
    """Ask, print, stop the child; the exit code.

    Raises:
        RunnerError: the model cannot be fetched, or the child failed.
        ModelError: the model's files cannot be read for its chat template.
        OSError: a picture cannot be read.
    """
    model = config.model or str(fetch_with_progress(config.cache))
    sys.stderr.write(asyncio.run(_ask(config, model)) + "\n")
    return 0


async def _ask(config: TryConfig, model: str) -> str:
    """Ask and print; the line of figures."""
    flags = (f"--store={config.runner.store}", *config.runner_flags)
    images = [file.read_bytes() for file in config.images]
    bar = ProgressBar(f"loading {Path(model).name}")
    async with spawn(model, dialect=DialectName.CLASSIC, flags=flags) as child:
        await child.wait_answering()
        await _load(child, config)
        load_s, prompt = await asyncio.gather(_loaded(child, bar), asyncio.to_thread(_prompt, config, model))
        if prompt is None:
            if images:
                raise ChildError("an embedding model takes no pictures; leave out --input-image")
            figures = await _embed(child, config.prompt, load_s)
        else:
            first_token_s, last = await _stream(child, prompt, _options(config), images)
            figures = Figures(load_s, first_token_s, last, child.peak_memory_bytes()).line()
        code = await child.stop()
    if code != 0:
        raise ChildError(f"the runner answered, but then ended with exit code {code}: {child.last_words()}")
    return figures


async def _loaded(child: Child, bar: ProgressBar) -> float:
    await child.wait_ready(progress=bar.show)
    return bar.finish()


async def _load(child: Child, config: TryConfig) -> None:
    answer = await child.load(context=config.runner.context, parallel=1)
    if isinstance(answer, dict) and answer.get("Success") is False:
        needed = _total(answer.get("Memory"))
        raise ChildError(
            f"insufficient memory: the model needs {needed / 2**30:.1f} GiB, more than is available; choose a smaller "
            "or quantised model, --weights=keep or a smaller --context, or --check-memory=false to try all the same"
        )


def _total(memory: JSON) -> int:
    """The sum of all figures of a memory table."""
    if isinstance(memory, dict):
        return sum(map(_total, memory.values()))
    if isinstance(memory, list):
        return sum(map(_total, memory))
    return memory if isinstance(memory, int) else 0


def _options(config: TryConfig) -> dict[str, JSON]:
    options: dict[str, JSON] = {"temperature": config.temperature, "num_predict": config.num_predict}
    options["seed"] = -1 if config.seed is None else config.seed
    return options


async def _embed(child: Child, text: str, load_s: float) -> str:
    """Print how long the text's vector is and how it begins; the line of figures."""
    begin = time.perf_counter()
    vector, tokens = await child.embed(text)
    taken_s = time.perf_counter() - begin
    sys.stdout.write(f"{len(vector)} dimensions: {', '.join(f'{value:.4f}' for value in vector[:SHOWN_VALUES])}, …\n")
    sys.stdout.flush()
    line = f"load {load_s:.2f} s | text {tokens} tokens | embedding {taken_s * 1e3:.1f} ms"
    peak = child.peak_memory_bytes()
    return line if peak is None else f"{line} | peak memory {peak / 2**20:.0f} MiB"


def _prompt(config: TryConfig, model: str) -> str | None:
    """What the model is given: the conversation in the model's own template, or the bare prompt if it has none.

    None: it makes embeddings.
    """
    from models.chat_template import render_chat  # noqa: PLC0415 - MLX comes with it; the child has its head start
    from models.checkpoint import open_checkpoint  # noqa: PLC0415
    from models.embedding import read_settings  # noqa: PLC0415
    from models.tokenizer import load_tokenizer  # noqa: PLC0415

    checkpoint = open_checkpoint(model, config.runner.store)
    if read_settings(checkpoint, config.runner.pooling) is not None:
        return None
    # As Ollama does it, in front of what the user says.
    prompt = "".join(f"[img-{number}]" for number in range(len(config.images))) + config.prompt
    if config.raw:
        return prompt
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.chat_template is None:
        sys.stderr.write("the model has no chat template: the prompt is sent as it is\n")
        return prompt
    system: list[dict[str, object]] = [] if config.system is None else [{"role": "system", "content": config.system}]

    def rendered(content: object) -> str:
        messages = [*system, {"role": "user", "content": content}]
        template, bos, eos = tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token
        assert template is not None
        return render_chat(template, messages, bos_token=bos, eos_token=eos)

    chat = rendered(prompt)
    # Templates of models that see may know what is said in parts alone, and leave out anything else.
    is_there = prompt.strip() in chat or not config.images
    return chat if is_there else rendered([{"type": "text", "text": prompt}])


async def _stream(child: Child, prompt: str, options: dict[str, JSON], images: Sequence[bytes]) -> tuple[float, Piece]:
    """Print the answer as it comes; the seconds to its first piece, and its last line."""
    begin = time.perf_counter()
    first_token_s: float | None = None
    async with aclosing(child.complete(prompt, options, images)) as pieces:
        async for piece in pieces:
            if first_token_s is None:
                first_token_s = time.perf_counter() - begin
            sys.stdout.write(piece.content)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert first_token_s is not None  # a stream without a line is a ChildError
    return first_token_s, piece
