"""The `create` command: a model's files into an Ollama store.

Owns what a person sees (notes and a bar on stderr, one line on stdout) and what signals do: whatever ends the command
early, nothing of the model stays.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from runner.config import CreateConfig
from runner.flags import UsageError
from runner.progress_bar import ProgressBar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(config: CreateConfig) -> None:
    """Create the model.

    Raises:
        UsageError: the template can be neither a template nor a file.
        ModelError: the source, the name or the store will not do; nothing has been written.
        KeyboardInterrupt: a signal came; nothing has been written.
    """
    template = _template(config.template)
    with _interruptible():
        from models.image import blas  # noqa: PLC0415 - before MLX, which quantises

        blas.prepare()
        from models.store import CreateRequest, create_model  # noqa: PLC0415 - imports MLX

        request = CreateRequest(
            name=config.name,
            source=config.source.expanduser(),
            store=config.store,
            quantize=config.quantize,
            template=template,
            force=config.force,
        )
        with _bar(f"creating {config.name}") as bar:
            created = create_model(request, progress=bar.show, note=_say)
            seconds = bar.finish()
    sys.stdout.write(f"{created.name}: {created.layers} layers, {_size(created.nbytes)}, in {seconds:.1f} s\n")


def _template(given: str | None) -> str | None:
    """The template itself: a text without an action is the name of a file."""
    if given is None or "{{" in given:
        return given
    try:
        text = Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f'--template: "{given}" holds no {{{{ }}}} and is no file that can be read: {error}'
        ) from error
    if "{{" not in text:
        raise UsageError(f"--template: {given} holds no {{{{ }}}}, so the prompt would never be in it")
    return text


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


@contextlib.contextmanager
def _bar(label: str) -> Iterator[ProgressBar]:
    bar = ProgressBar(label)
    with contextlib.ExitStack() as unless_whole:
        unless_whole.callback(bar.abandon)
        yield bar
        unless_whole.pop_all()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt, and no further one disturb the tidying up."""
    asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
        nonlocal asked
        if not asked:
            asked = True
            raise KeyboardInterrupt

    # What is ignored stays so: nohup ignores the hang-up.
    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; nothing of it stays")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
