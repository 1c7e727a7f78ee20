"""The `try --image` command: a picture or several from a pipeline, through a child process as Ollama would have it.

Owns what a person sees: a bar of steps, the files, one line of figures. The child speaks the imagegen dialect.
"""

import asyncio
import base64
import sys
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import models
from runner.config import DialectName, TryImageConfig
from runner.errors import StartupError
from runner.image_flags import SUFFIXES, PictureFlags
from runner.parent import JSON, Child, ChildError, spawn
from runner.progress_bar import ProgressBar


@dataclass(slots=True)
class Figures:
    """What one run measured. Durations in seconds, those of the last picture by the child's own counting."""

    load_s: float
    last: Mapping[str, JSON] = field(default_factory=dict)
    """The last line of the answer."""
    total_s: float = 0.0
    """From the request to the last picture."""
    peak_bytes: int | None = None

    def line(self) -> str:
        """The line a person reads."""
        steps = _number(self.last, "eval_count")
        denoise_s, encode_s, decode_s = (
            _number(self.last, name) / 1e9 for name in ("eval_duration", "prompt_eval_duration", "decode_duration")
        )
        rate = f" ({denoise_s / steps:.3f} s a step)" if steps else ""
        parts = [
            f"load {self.load_s:.2f} s",
            f"prompt {encode_s:.2f} s",
            f"{steps} steps {denoise_s:.2f} s{rate}",
            f"decode {decode_s:.2f} s",
            f"in all {self.total_s:.2f} s",
        ]
        if self.peak_bytes is not None:
            parts.append(f"peak memory {self.peak_bytes / 2**20:.0f} MiB")
        return " | ".join(parts)


def demonstration_model() -> Path:
    """The folder of the pipeline that comes with this package.

    Raises:
        StartupError: it did not come.
    """
    folder = Path(models.__file__).parent / "image" / "shapes"
    if not (folder / "model_index.json").is_file():
        raise StartupError(f"the demonstration model is not in {folder}; name another: --model NAME")
    return folder


def run(config: TryImageConfig) -> int:
    """Ask, write the files, stop the child; the exit code.

    Raises:
        RunnerError: there is no model, or the child failed.
        OSError: a file cannot be read or written.
    """
    model = config.model or str(demonstration_model())
    figures = asyncio.run(_make(config, model, wanted(config.prompt, config.picture)))
    sys.stderr.write(figures.line() + "\n")
    return 0


def wanted(prompt: str, picture: PictureFlags) -> dict[str, JSON]:
    """The request's body; what was left open is left out."""
    body: dict[str, JSON] = {
        "prompt": prompt,
        "width": picture.width,
        "height": picture.height,
        "steps": picture.steps,
        "seed": picture.seed,
        "guidance": picture.guidance,
        "negative_prompt": picture.negative_prompt or None,
        "strength": picture.strength,
        "images": [base64.b64encode(file.read_bytes()).decode() for file in picture.input_images] or None,
        "format": picture.format,
        "n": picture.count,
        "step_cache": picture.step_cache,
    }
    return {name: value for name, value in body.items() if value is not None}


async def _make(config: TryImageConfig, model: str, body: dict[str, JSON]) -> Figures:
    flags = (f"--store={config.runner.store}", *config.runner_flags)
    bar = ProgressBar(f"loading {Path(model).name}")
    async with spawn(model, dialect=DialectName.IMAGEGEN, flags=flags) as child:
        await child.wait_ready()
        figures = Figures(bar.finish())
        await _draw(child, body, config.picture, figures)
        figures.peak_bytes = child.peak_memory_bytes()
        code = await child.stop()
    if code != 0:
        raise ChildError(f"the runner answered, but then ended with exit code {code}: {child.last_words()}")
    return figures


async def _draw(child: Child, body: dict[str, JSON], picture: PictureFlags, figures: Figures) -> None:
    """Follow the answer, and write each picture as it comes."""
    begin = time.perf_counter()
    bar: ProgressBar | None = None
    async with aclosing(child.exchange("/completion", body)) as lines:
        async for line in lines:
            if step := _number(line, "step"):
                bar = bar or ProgressBar("drawing")
                total = _number(line, "total")
                bar.show(step / total, f"{step}/{total}")
            if image := line.get("image"):
                if bar is not None:
                    bar.finish()
                    bar = None
                _write(base64.b64decode(str(image)), line, picture)
                figures.last = line
    figures.total_s = time.perf_counter() - begin


def _write(data: bytes, line: Mapping[str, JSON], picture: PictureFlags) -> None:
    file = file_of(picture, _number(line, "index"), str(line.get("format")))
    file.write_bytes(data)
    sys.stdout.write(f"{file} (seed {line.get('seed')})\n")
    sys.stdout.flush()


def file_of(picture: PictureFlags, index: int, format_: str) -> Path:
    """The picture's file: numbered if there are several, renamed if it was sent in another format than asked for."""
    file = picture.output
    if (picture.count or 1) > 1:
        file = file.with_stem(f"{file.stem}-{index + 1}")
    if format_ != picture.format and format_ in SUFFIXES.values():
        file = file.with_suffix(f".{format_}")
    return file


def _number(line: Mapping[str, JSON], name: str) -> int:
    value = line.get(name)
    return value if isinstance(value, int) else 0
