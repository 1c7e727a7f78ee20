"""What is planned for a model before anything of it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from models.sources.base import JSON
from models.store.chat_format import chat_format_of
from models.store.content import Content
from models.store.go_json import go_json
from models.store.plan import PlannedBlob

IMAGE = "application/vnd.ollama.image"
TENSOR, JSON_FILE, GGUF_MODEL = f"{IMAGE}.tensor", f"{IMAGE}.json", f"{IMAGE}.model"
PROJECTOR = f"{IMAGE}.projector"
ModelKind: TypeAlias = Literal["gguf", "safetensors", "image"]


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A layer that needs no tensor: its bytes are at hand or in a file."""

    media_type: str
    content: Content
    name: str = ""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """All that a model will be. `notes` is what the person who creates it should know."""

    kind: ModelKind
    blobs: Sequence[PlannedBlob]
    layers: Sequence[PlannedLayer]
    config: Mapping[str, JSON]
    notes: Sequence[str] = field(default=())


def chat_layers(template: str | None, chat_template: str, *, rendered: bool) -> tuple[list[PlannedLayer], list[str]]:
    """The layers that say how a chat becomes a prompt, and what is to be said about them."""
    if template is not None:
        return [PlannedLayer(f"{IMAGE}.template", Content((template.encode(),)))], []
    if rendered or not chat_template:
        return [], []
    found = chat_format_of(chat_template)
    if found is None:
        return [], ["the model's chat format is not a known one: give Ollama a template with --template"]
    stop = go_json({"stop": list(found.stop)}) + b"\n"
    layers = [
        PlannedLayer(f"{IMAGE}.template", Content((found.template.encode(),))),
        PlannedLayer(f"{IMAGE}.params", Content((stop,))),
    ]
    return layers, [f"chat format: {found.name}"]
