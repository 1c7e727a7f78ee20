"""Log lines on stderr in the manner of Ollama's: `time=… level=INFO source=file.py:12 msg="…" key=value`.

A caller adds pairs with `logger.info("model loaded", extra={"fields": {"seconds": 1.5}})`. A record is one line: a
traceback becomes a quoted value. Parents show their user the last line of stderr, or those that contain `Error:`, so
`fatal` writes the cause of death in that form and nothing may follow it.
"""

import logging
import math
import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TextIO

TRACE = 5
"""Below DEBUG: OLLAMA_DEBUG=2."""

LEVEL_NAMES = {TRACE: "TRACE", logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN"}
ESCAPES = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    "\\": r"\\",
    '"': r"\"",
}

logger = logging.getLogger(__name__)


def _escape(character: str) -> str:
    """A character as Go's strconv.Quote writes it."""
    if character in ESCAPES:
        return ESCAPES[character]
    if character == " " or character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _quoted(text: str) -> str:
    """The text, in quotes if Go's slog.TextHandler would put them."""
    if text and all(c.isprintable() and c not in ' "=' for c in text):
        return text
    return '"' + "".join(map(_escape, text)) + '"'


def _text(value: object) -> str:
    """A value as Go's slog would print it."""
    match value:
        case None:
            return "<nil>"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:.6g}" if math.isfinite(value) else {"nan": "NaN", "inf": "+Inf"}.get(str(value), "-Inf")
        case timedelta():
            return f"{value.total_seconds():.9g}s"
        case list() | tuple():
            return "[" + " ".join(map(_text, value)) + "]"
        case _:
            return str(value)


class SlogFormatter(logging.Formatter):
    """One record, one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as Ollama's text handler would write it."""
        time = datetime.fromtimestamp(record.created, tz=UTC).astimezone()
        offset = time.strftime("%z")
        zone = "Z" if offset == "+0000" else f"{offset[:3]}:{offset[3:]}"
        parts = [
            f"time={time:%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}{zone}",
            f"level={LEVEL_NAMES.get(record.levelno, 'ERROR')}",
            f"source={_quoted(f'{record.filename}:{record.lineno}')}",
            f"msg={_quoted(record.getMessage())}",
        ]
        fields = record.__dict__.get("fields")
        if isinstance(fields, Mapping):
            parts += [f"{_quoted(str(key))}={_quoted(_text(value))}" for key, value in fields.items()]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(f"error={_quoted(repr(record.exc_info[1]))}")
            parts.append(f"stack={_quoted(self.formatException(record.exc_info))}")
        return " ".join(parts)


def level_of(debug: int) -> int:
    """The logging level for OLLAMA_DEBUG's number."""
    if debug >= 2:
        return TRACE
    return logging.DEBUG if debug == 1 else logging.INFO if debug == 0 else logging.WARNING


def configure(debug: int, stream: TextIO | None = None) -> None:
    """Send all logging, Python's warnings and stray exceptions of threads to `stream` (stderr)."""
    logging.addLevelName(TRACE, "TRACE")
    # A parent that died has closed our stderr: a log line that nobody reads is no reason to fail.
    logging.raiseExceptions = False
    logging.captureWarnings(capture=True)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(SlogFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level_of(debug))
    if debug < 2:
        for chatty in ("asyncio", "aiohttp.access", "gguf"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
    threading.excepthook = _log_thread_exception


def _log_thread_exception(arguments: threading.ExceptHookArgs) -> None:
    kind, error, traceback = arguments.exc_type, arguments.exc_value, arguments.exc_traceback
    if error is not None:
        info: tuple[type[BaseException], BaseException, TracebackType | None] = (kind, error, traceback)
        name = arguments.thread.name if arguments.thread else "?"
        logger.error("a thread ended by an error", extra={"fields": {"thread": name}}, exc_info=info)


def fatal_line(message: str) -> str:
    """`Error: message`, on one line whatever the message holds."""
    return "Error: " + "; ".join(line.strip() for line in message.splitlines() if line.strip())


def fatal(message: str, stream: TextIO | None = None) -> None:
    """Write the cause of death as the last line; the caller exits without another word."""
    target = stream or sys.stderr
    try:
        target.write(fatal_line(message).encode(errors="backslashreplace").decode() + "\n")
        target.flush()
    except (OSError, ValueError):  # stderr is closed: nobody is left to tell
        return


def fatal_after_all(message: str) -> None:
    """The same where a library goes on writing to stderr, perhaps in the middle of a line: it is not heard any more."""
    try:
        own = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    except OSError:  # stderr is closed
        return
    with os.fdopen(own, "w") as stream:
        stream.write("\n")
        fatal(message, stream)
