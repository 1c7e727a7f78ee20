"""Command-line flags with Go's manners, and the environment variables that stand in for them.

Owns the grammar (`-model x`, `--model=x` and `--model x` mean the same; a switch takes a value only after `=`; `--`
ends the flags) and the wording of what is wrong with a value. Knows none of the flags; `runner.config` lists those.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from runner.errors import StartupError

TRUE = ("1", "t", "T", "TRUE", "true", "True")
FALSE = ("0", "f", "F", "FALSE", "false", "False")


class UsageError(StartupError):
    """The command line or the environment is wrong; the message says what to write instead.

    Exits with 2, as Go's `flag` package and Python's argparse do, so that scripts can tell it from a failure at work.
    """


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name without dashes, the word for its value in the help (empty for a switch), its variables."""

    name: str
    metavar: str
    help: str
    variables: tuple[str, ...] = ()
    repeats: bool = False
    """May be given several times; the values count together, as one given with commas would."""

    @property
    def is_switch(self) -> bool:
        """Takes no value of its own; its presence means true."""
        return not self.metavar


@dataclass(frozen=True, slots=True)
class Value:
    """A value as text, and where it came from, for messages."""

    text: str
    origin: str


def variable(environ: Mapping[str, str], name: str) -> str:
    """An environment variable without the blanks and quotes around it; empty if unset.

    Source: envconfig.Var, ollama v0.24.0.
    """
    return environ.get(name, "").strip().strip("\"'")


def parse_bool(text: str) -> bool | None:
    """The boolean that `text` spells in Go's strconv.ParseBool, or None."""
    return True if text in TRUE else False if text in FALSE else None


def debug_level(environ: Mapping[str, str]) -> int:
    """OLLAMA_DEBUG: 1 or a Go boolean is debug, 2 trace, -1 warnings only; what cannot be read is 0.

    Source: envconfig.LogLevel, ollama v0.24.0.
    """
    text = variable(environ, "OLLAMA_DEBUG")
    if parse_bool(text):
        return 1
    try:
        return int(text)
    except ValueError:
        return 0


def _split(argument: str) -> tuple[str, str | None]:
    """The flag's name and its value after `=`, if there is one."""
    name, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
    return name, value if equals else None


def parse_flags(
    argv: Sequence[str], flags: Sequence[Flag], *, interspersed: bool = False
) -> tuple[dict[str, Value], list[str]]:
    """Split argv into flag values by name (the last one wins, but for flags that repeat) and the remaining words.

    Args:
        argv: the arguments after the command's word.
        flags: the flags the command knows.
        interspersed: flags may follow words; Go's package stops at the first word.

    Raises:
        UsageError: an unknown flag or a missing value.
    """
    known = {flag.name: flag for flag in flags}
    values: dict[str, Value] = {}
    words: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if argument == "--":
            words.extend(rest)
        elif argument == "-" or not argument.startswith("-"):
            words.append(argument)
            if not interspersed:
                words.extend(rest)
        else:
            name, value = _split(argument)
            flag = known.get(name)
            text = _value_of(flag, name, value, rest)
            if flag is not None and flag.repeats and name in values:
                text = f"{values[name].text},{text}"
            values[name] = Value(text, f"--{name}")
    return values, words


def _value_of(flag: Flag | None, name: str, value: str | None, rest: Iterator[str]) -> str:
    if flag is None:
        raise UsageError(f"unknown flag --{name}; --help lists the flags")
    if value is not None:
        return value
    if flag.is_switch:
        return "true"
    following = next(rest, None)
    if following is None:
        raise UsageError(f"--{name} needs a value: --{name} {flag.metavar}")
    return following


class Settings:
    """The values of one command: a flag before its environment variables, those before the default."""

    def __init__(self, values: Mapping[str, Value], flags: Sequence[Flag], environ: Mapping[str, str]) -> None:
        self._values = dict(values)
        for flag in flags:
            for name in flag.variables:
                if flag.name not in self._values and (text := variable(environ, name)):
                    self._values[flag.name] = Value(text, name)

    def text(self, name: str) -> str | None:
        """The value as written; None if nobody gave one or it is empty."""
        value = self._values.get(name)
        return value.text if value and value.text else None

    def texts(self, name: str) -> list[str]:
        """The values of a flag that repeats, in the order given; empty ones do not count."""
        value = self._values.get(name)
        return [text for text in value.text.split(",") if text] if value else []

    def integer(self, name: str, *, least: int, most: int = 2**31 - 1) -> int | None:
        """A whole number within bounds.

        Raises:
            UsageError: it is not.
        """
        value = self._values.get(name)
        if value is None:
            return None
        try:
            number = int(value.text, 0)
        except ValueError:
            raise UsageError(f'{value.origin} must be a whole number, not "{value.text}"') from None
        if number < least:
            raise UsageError(f"{value.origin} must be at least {least}, not {number}")
        if number > most:
            raise UsageError(f"{value.origin} must be at most {most}, not {number}")
        return number

    def number(self, name: str, *, least: float) -> float | None:
        """A finite number of at least `least`.

        Raises:
            UsageError: it is not.
        """
        value = self._values.get(name)
        if value is None:
            return None
        try:
            number = float(value.text)
        except ValueError:
            raise UsageError(f'{value.origin} must be a number, not "{value.text}"') from None
        if not least <= number < float("inf"):
            raise UsageError(f"{value.origin} must be a number of at least {least:g}, not {value.text}")
        return number

    def boolean(self, name: str, *, default: bool) -> bool:
        """A switch.

        Raises:
            UsageError: the value is no boolean.
        """
        value = self._values.get(name)
        if value is None:
            return default
        truth = parse_bool(value.text)
        if truth is None:
            raise UsageError(f'{value.origin} must be true or false, not "{value.text}"')
        return truth

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """One of a few words.

        Raises:
            UsageError: it is another.
        """
        value = self._values.get(name)
        if value is None:
            return None
        if value.text not in choices:
            raise UsageError(f'{value.origin} must be one of {", ".join(choices)}, not "{value.text}"')
        return value.text
