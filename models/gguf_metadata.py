"""Typed reading of a GGUF file's metadata, with errors that name the file and the key."""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from models.errors import CheckpointError

GGUFValue: TypeAlias = "bool | int | float | str | list[GGUFValue]"


class GGUFMetadata:
    """The values of one architecture, by their names without its prefix, and the tensors' shapes. Thread: any.

    A value that makes no sense is a CheckpointError in every method.
    """

    def __init__(
        self,
        values: Mapping[str, GGUFValue],
        shapes: Mapping[str, tuple[int, ...]],
        vector: Callable[[str], list[float] | None],
        file: str,
    ) -> None:
        """Read `values`.

        Args:
            values: all metadata, by full name.
            shapes: of the tensors, rows first, by GGUF's names.
            vector: reads a tensor of one dimension; None where there is none of that name.
            file: what messages call the file.

        Raises:
            CheckpointError: they do not say what architecture it is.
        """
        arch = values.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise CheckpointError("its metadata has no general.architecture", file=file)
        self.arch = arch
        self.shapes = shapes
        self.vector = vector
        self.file = file
        self._values = values

    def integer(self, name: str) -> int | None:
        """A whole number from 0 on; None where the file has no such value."""
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(name, value)
        return value

    def count(self, name: str) -> int:
        """A required whole number above 0."""
        value = self.integer(name)
        if value is None:
            raise CheckpointError(f"its metadata has no {self.arch}.{name}", file=self.file)
        if value == 0:
            raise self._wrong(name, value)
        return value

    def real(self, name: str) -> float | None:
        """A finite number from 0 on; None where the file has no such value."""
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise self._wrong(name, value)
        return float(value)

    def text(self, name: str) -> str | None:
        """A string; None where the file has no such value."""
        value = self._get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value)
        return value

    def flag(self, name: str) -> bool | None:
        """True or false; None where the file has no such value."""
        value = self._get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value)
        return value

    def each(self, name: str, layers: int) -> list[int] | None:
        """A whole number for each layer; one value stands for all; None where the file has none."""
        value = self._values.get(f"{self.arch}.{name}")
        if not isinstance(value, list):
            single = self.integer(name)
            return None if single is None else [single] * layers
        if len(value) < layers or not all(isinstance(item, int) and item >= 0 for item in value):
            raise self._wrong(name, value)
        return [int(item) for item in value[:layers] if isinstance(item, int)]

    def flags(self, name: str, layers: int) -> list[bool] | None:
        """True or false for each layer; None where the file has no such list."""
        value = self._values.get(f"{self.arch}.{name}")
        if not isinstance(value, list):
            return None
        if len(value) < layers or not all(item in (0, 1) for item in value):
            raise self._wrong(name, value)
        return [bool(item) for item in value[:layers]]

    def integers(self, name: str) -> list[int] | None:
        """Whole numbers from 0 on, as many as there are; None where the file has no such list."""
        value = self._values.get(f"{self.arch}.{name}")
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(name, value)
        numbers = [item for item in value if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
        if len(numbers) < len(value):
            raise self._wrong(name, value)
        return numbers

    def has(self, name: str) -> bool:
        """Whether there is a value of that whole name."""
        return name in self._values

    def reals(self, name: str, layers: int, *, infinite: bool = False) -> list[float]:
        """A number of either sign for each layer, under a whole name; one value stands for all."""
        value = self._values.get(name)
        values = value if isinstance(value, list) else [value] * layers
        numbers = [float(each) for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
        makes_sense = all(math.isfinite(each) or (infinite and not math.isnan(each)) for each in numbers)
        if len(numbers) < layers or len(numbers) < len(values) or not makes_sense:
            shown = repr(value)[:60]
            raise CheckpointError(f"its metadata has {name} = {shown}, which makes no sense", file=self.file)
        return numbers[:layers]

    def _get(self, name: str) -> "GGUFValue | None":
        value = self._values.get(f"{self.arch}.{name}")
        # Some converters write one value a layer. Alike in every layer, it is one value.
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            return value[0]
        return value

    def _wrong(self, name: str, value: "GGUFValue | None") -> CheckpointError:
        shown = repr(value)[:60]
        return CheckpointError(f"its metadata has {self.arch}.{name} = {shown}, which makes no sense", file=self.file)
