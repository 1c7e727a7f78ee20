"""The name of a model in the Ollama store.

Source: ollama v0.24.0 types/model/name.go, for the form and the defaults.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from models.errors import ModelNotFoundError

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A full name. Every part has been checked, so none can lead out of the store."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """Read `name`, `name:tag`, `ns/name:tag` or `host/ns/name:tag`, a scheme before the host allowed.

        Raises:
            ModelNotFoundError: the text is no model name.
        """
        rest, tag = text, "latest"
        if text.rfind(":") > text.rfind("/"):
            rest, _, tag = text.rpartition(":")
        rest, _, model = rest.rpartition("/")
        has_namespace = model != text and "/" in text
        host, _, namespace = rest.rpartition("/")
        host = host.rpartition("://")[2]
        name = cls(host if "/" in rest else "registry.ollama.ai", namespace if has_namespace else "library", model, tag)
        if not name._is_valid():
            raise ModelNotFoundError(
                f"{text!r} is no file, no folder and no model name (a name is [[host/]namespace/]name[:tag])"
            )
        return name

    def _is_valid(self) -> bool:
        parts = ((_HOST, self.host), (_NAMESPACE, self.namespace), (_PART, self.model), (_PART, self.tag))
        return all(pattern.fullmatch(part) for pattern, part in parts)

    def __str__(self) -> str:
        """The name as a person writes it, without the defaults."""
        short = f"{self.model}:{self.tag}"
        if self.host.lower() != "registry.ollama.ai":
            return f"{self.host}/{self.namespace}/{short}"
        return short if self.namespace.lower() == "library" else f"{self.namespace}/{short}"

    def manifest(self, store: Path) -> Path | None:
        """The manifest's file, or None if the store has no such model.

        The spelling as given is preferred; after that case does not matter, as it does not to Ollama.
        """
        folder = store / "manifests"
        exact = folder / self.host / self.namespace / self.model / self.tag
        if exact.is_file():
            return exact
        found = [folder]
        for part in (self.host, self.namespace, self.model, self.tag):
            found = [child for parent in found for child in _same_name(parent, part)]
        return next((path for path in found if path.is_file()), None)


def _same_name(parent: Path, name: str) -> list[Path]:
    try:
        return sorted(child for child in parent.iterdir() if child.name.lower() == name.lower())
    except OSError:
        return []
