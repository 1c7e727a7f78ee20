"""The checkpoint as the rest of the package sees it, whatever files it comes from.

Every source (Hugging Face folder, Ollama store, GGUF file) presents itself in one language: Hugging Face names for
tensors, Hugging Face keys in the configuration, Hugging Face files for tokenizer and generation settings. A source
that is not made of such files (GGUF) translates; nothing outside `models.sources` knows that there was anything to
translate.
"""

from pathlib import Path

from models.errors import CheckpointError, ModelNotFoundError
from models.quantization import Packed
from models.sources.base import JSON, Checkpoint, NamedTensor, Tensor, TensorInfo
from models.sources.gguf_header import is_gguf
from models.sources.gguf_seeing import open_gguf
from models.sources.hf import HFDirectory
from models.sources.ollama import open_ollama_model

__all__ = ["JSON", "Checkpoint", "NamedTensor", "Packed", "Tensor", "TensorInfo", "open_checkpoint"]


def open_checkpoint(
    reference: str, store: Path, projector: Path | None = None, *, verify_digests: bool = False
) -> Checkpoint:
    """Open what `reference` names: a Hugging Face folder, a GGUF file or blob, or a model of the Ollama store.

    A GGUF file is opened with its vision tower, see `models.sources.gguf_seeing`; `projector` is a file that has it.

    A path that exists is taken as a path; anything else is a name in `store`. A folder that merely has a model's name,
    and no configuration in it, is no checkpoint: then the store is asked.

    Raises:
        ModelNotFoundError: nothing is there; the message lists what was tried.
        CheckpointError: it is there but cannot be read.
    """
    if not reference:
        raise ModelNotFoundError("no model is named: give a model's name, a folder or a GGUF file")
    is_path = reference.startswith(("/", "./", "../", "~")) or reference in (".", "..")
    try:
        path = Path(reference).expanduser()
        if path.is_file():
            return _open_file(path, projector)
        is_folder = path.is_dir()
        if is_folder and ((path / "config.json").is_file() or (path / "model_index.json").is_file()):
            if projector is not None:
                raise CheckpointError("a projector file goes with a GGUF file alone", file=reference)
            return HFDirectory(path)
    except (OSError, RuntimeError) as error:
        # A name too long for a path, a folder we may not enter, a `~` without a home.
        raise ModelNotFoundError(f"{reference[:200]}: {error}") from error
    if is_path and is_folder:
        raise _no_configuration(reference)
    if is_path:
        raise ModelNotFoundError(f"{reference}: no such file or folder")
    try:
        return open_ollama_model(reference, store, projector, verify_digests=verify_digests)
    except ModelNotFoundError as error:
        if is_folder:
            raise _no_configuration(reference) from error
        raise


def _no_configuration(folder: str) -> CheckpointError:
    return CheckpointError("the folder has neither a config.json nor a model_index.json", file=folder)


def _open_file(path: Path, projector: Path | None) -> Checkpoint:
    if is_gguf(path):
        return open_gguf(path, str(path), projector, beside=True)
    if path.suffix == ".safetensors":
        raise CheckpointError("name the folder it is in: a safetensors file needs its config.json", file=str(path))
    raise CheckpointError("not a GGUF file", file=str(path))
