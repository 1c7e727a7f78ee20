"""Typed reading of a JSON configuration, with errors that name the file and the key."""

from collections.abc import Mapping
from typing import TypeAlias

from models.errors import CheckpointError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


class ConfigReader:
    """Reads one JSON object; null counts as absent. A value of the wrong kind is a CheckpointError in every method."""

    def __init__(self, values: Mapping[str, JSON], file: str = "config.json") -> None:
        self._values = values
        self._file = file

    @property
    def file(self) -> str:
        """What messages call the file."""
        return self._file

    def value(self, key: str) -> JSON:
        """What is there, of whatever kind; None where nothing is."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; required where no default is given."""
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "a whole number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.integer(key, default)
        if value <= 0:
            raise self._wrong(key, value, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; required where no default is given."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, value, "a number")
        return float(value)

    def positive(self, key: str) -> float:
        """A required number above 0."""
        value = self.number(key)
        if value <= 0:
            raise self._wrong(key, value, "a number above 0")
        return value

    def numbers(self, key: str) -> list[float]:
        """A required list of numbers."""
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list of numbers")
        return [ConfigReader({key: item}, self._file).number(key) for item in value]

    def sizes(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers above 0, or None where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list of whole numbers")
        return tuple(ConfigReader({key: item}, self._file).size(key) for item in value)

    def count(self, key: str, most: int, default: int | None = None) -> int:
        """A whole number from 1 to `most`."""
        value = self.size(key, default)
        if value > most:
            raise self._wrong(key, value, f"a whole number up to {most}")
        return value

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; empty where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list of whole numbers")
        return [ConfigReader({key: item}, self._file).integer(key) for item in value]

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def flags(self, key: str) -> list[bool] | None:
        """A list of true and false, or of 1 and 0; None where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(item in (0, 1) for item in value):
            raise self._wrong(key, value, "a list of true and false")
        return [bool(item) for item in value]

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list of strings")
        return [ConfigReader({key: item}, self._file).text(key, "") for item in value]

    def mapping(self, key: str) -> Mapping[str, JSON]:
        """A nested object as it is; empty where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return value

    def section(self, key: str) -> "ConfigReader | None":
        """A nested object, or None where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return ConfigReader(value, self._file)

    def sections(self, key: str) -> "dict[str, ConfigReader]":
        """A nested object of objects, by their keys; empty where the key is absent."""
        inner = ConfigReader(self.mapping(key), self._file)
        return {name: ConfigReader(inner.mapping(name), self._file) for name in self.mapping(key)}

    def _value(self, key: str, default: JSON) -> JSON:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{key} is missing", file=self._file)
        return default

    def _wrong(self, key: str, value: JSON, wanted: str) -> CheckpointError:
        return CheckpointError(f"{key} must be {wanted}, not {value!r}", file=self._file)
