"""A Hugging Face folder: config.json, safetensors files (one or many shards), tokenizer files.

A folder that mlx-lm quantised says so in config.json's `quantization`, with exceptions layer by layer. A pipeline's
folder has a model_index.json and one such folder a component.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

from models.errors import CheckpointError, QuantizationError
from models.quantization import QuantizationSpec, spec_of_settings
from models.sources.base import JSON, NamedTensor, TensorInfo
from models.sources.safetensors_file import open_safetensors
from models.sources.tensor_table import Member, SpecRule, TensorTable, make_table

# Names that a folder's tensors go by when there is no index; the first that exists is it.
_SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "weights.safetensors")
# Where transformers and diffusers put a variant's name, before or behind a shard's number.
_SHARD = r"(?:-\d{5}-of-\d{5})?"
_VARIANT = re.compile(rf"(?:diffusion_pytorch_)?model{_SHARD}\.(?P<variant>\w+){_SHARD}\.safetensors")
_PREFERRED = ("", "bf16", "fp16")


class HFDirectory:
    """A folder as a checkpoint (see `Checkpoint`)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.reference = str(path)

    @cached_property
    def config(self) -> Mapping[str, JSON]:
        """config.json, or a pipeline's model_index.json.

        Raises:
            CheckpointError: neither is there, or it is no JSON object.
        """
        for name in ("config.json", "model_index.json"):
            text = self.read(name)
            if text is not None:
                return parse_config(text, f"{self.reference}/{name}")
        raise CheckpointError("the folder has neither a config.json nor a model_index.json", file=self.reference)

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all safetensors files that make up the model, its components included."""
        return sum(info.nbytes for component in self._components() for info in self.infos(component))

    def _components(self) -> list[str]:
        if (self._path / "config.json").exists():
            return [""]
        return sorted(
            folder.name for folder in self._path.iterdir() if folder.is_dir() and any(folder.glob("*.safetensors"))
        )

    def read(self, name: str) -> bytes | None:
        """A file of the folder. A name that leads out of the folder is as good as absent.

        Raises:
            CheckpointError: it is there but cannot be read.
        """
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not name:
            return None
        try:
            return (self._path / parts).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", file=str(self._path / parts)) from error

    def infos(self, component: str = "") -> Iterator[TensorInfo]:
        """See `Checkpoint.infos`."""
        yield from self.table(component).infos()

    def tensors(self, component: str = "") -> Iterator[NamedTensor]:
        """See `Checkpoint.tensors`."""
        yield from self.table(component).tensors()

    def table(self, component: str = "") -> TensorTable:
        """Where the tensors of one component are stored. Raises as `infos` does."""
        folder = self._path / component
        if not folder.is_dir():
            raise CheckpointError(f"the pipeline has no component {component!r}", file=self.reference)
        text = self.read(f"{component}/config.json" if component else "config.json")
        config = parse_config(text, str(folder / "config.json")) if text is not None else {}
        members: dict[str, Member] = {}
        for path in _tensor_files(folder):
            file = open_safetensors(path, str(path))
            for name, stored in file.tensors.items():
                if name in members:
                    raise CheckpointError(f"is in {members[name].file.label} as well", file=file.label, tensor=name)
                members[name] = Member(file, stored)
        _check_index(folder, members)
        return make_table(members, _spec_rule(config, str(folder / "config.json")))


def parse_config(text: bytes, file: str) -> dict[str, JSON]:
    """A configuration file's object.

    Raises:
        CheckpointError: it is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", file=file) from error
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", file=file)
    return value


def _tensor_files(folder: Path) -> list[Path]:
    index = _index(folder)
    if index is not None:
        path, weight_map = index
        names = sorted(set(weight_map.values()))
        for name in names:
            if PurePosixPath(name).name != name:
                raise CheckpointError(f"names a file outside the folder: {name!r}", file=str(path))
            if not (folder / name).is_file():
                raise CheckpointError(f"the file is missing; {path.name} lists it", file=str(folder / name))
        return [folder / name for name in names]
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    shards = sorted(folder.glob("model*.safetensors")) or [
        path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")
    ]
    if not shards:
        other = next(iter(sorted(folder.glob("*.bin")) or sorted(folder.glob("*.pt*"))), None)
        remedy = f"; {other.name} is in a format that runs code when read: convert it to safetensors" if other else ""
        raise CheckpointError(f"the folder has no safetensors file{remedy}", file=str(folder))
    return _of_one_variant(shards)


def _of_one_variant(shards: list[Path]) -> list[Path]:
    """The files without a variant in their names, else those of one: several are the same weights in other types."""
    variants = {path: match["variant"] if (match := _VARIANT.fullmatch(path.name)) else "" for path in shards}
    chosen = min(variants.values(), key=lambda name: (_PREFERRED.index(name) if name in _PREFERRED else 9, name))
    return [path for path in shards if variants[path] == chosen]


def _index(folder: Path) -> tuple[Path, dict[str, str]] | None:
    preferred = folder / "model.safetensors.index.json"
    path = preferred if preferred.is_file() else next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if path is None:
        return None
    try:
        weight_map = parse_config(path.read_bytes(), str(path)).get("weight_map")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=str(path)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", file=str(path))
    return path, {name: str(file) for name, file in weight_map.items()}


def _check_index(folder: Path, members: Mapping[str, Member]) -> None:
    index = _index(folder)
    if index is None:
        return
    path, weight_map = index
    for name, file in weight_map.items():
        if name not in members:
            raise CheckpointError(f"is missing; {path.name} lists it", file=str(folder / file), tensor=name)


def _spec_rule(config: Mapping[str, JSON], file: str) -> SpecRule:
    settings = _mlx_settings(config, file)

    def spec_of(name: str, weight: Member, _scales: Member) -> QuantizationSpec:
        if settings is None:
            raise QuantizationError(f"{file}: tensor {name} is quantised, but there is no `quantization` entry")
        layer = name.removesuffix(".weight")
        own = settings.get(layer, settings.get(layer.removeprefix("model.")))
        match own:
            case None | True:
                return spec_of_settings(settings)
            case dict():
                return spec_of_settings(own)
        raise QuantizationError(f"{weight.file.label}: tensor {name} is quantised, but config.json says {own!r}")

    return spec_of


def _mlx_settings(config: Mapping[str, JSON], file: str) -> dict[str, JSON] | None:
    settings = config.get("quantization")
    foreign = config.get("quantization_config")
    if settings is None and isinstance(foreign, dict):
        method = foreign.get("quant_method")
        if method == "mxfp4":
            # The tensors themselves say which they are.
            return None
        if method is not None:
            raise QuantizationError(
                f"{file}: weights quantised with {method} are not supported; use the model's bfloat16 files, or a "
                "version converted for MLX"
            )
        settings = foreign
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise QuantizationError(f"{file}: quantization {settings!r} is malformed")
    return settings
