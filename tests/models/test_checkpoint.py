import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.errors import CheckpointError, ModelError, ModelNotFoundError
from models.sources.gguf import GGUFFile
from models.sources.hf import HFDirectory
from models.sources.ollama import OllamaManifest


def hf_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    mx.save_safetensors(str(path / "model.safetensors"), {"a": mx.ones(1)})
    return path


def test_a_folder_is_opened_by_its_path(tmp_path: Path):
    assert isinstance(open_checkpoint(str(hf_folder(tmp_path / "m")), tmp_path), HFDirectory)


def test_a_relative_path_without_a_dot_is_a_path_if_a_model_is_there(
    tmp_path: Path, store_writer, monkeypatch: pytest.MonkeyPatch
):
    store_writer.tensors("a", {"a": mx.ones(1)})
    store_writer.manifest()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert isinstance(open_checkpoint("tiny", store_writer.store), OllamaManifest)
    hf_folder(tmp_path / "models" / "tiny")
    assert isinstance(open_checkpoint("models/tiny", store_writer.store), HFDirectory)
    assert isinstance(open_checkpoint("./models/tiny", store_writer.store), HFDirectory)


def test_a_gguf_file_is_known_by_its_first_bytes_and_not_its_name(parity: Path, tmp_path: Path):
    blob = tmp_path / "sha256-00"
    blob.write_bytes((parity / "llama_gqa.gguf").read_bytes())
    assert isinstance(open_checkpoint(str(blob), tmp_path), GGUFFile)


def test_a_name_is_looked_up_in_the_store(store_writer):
    store_writer.tensors("a", {"a": mx.ones(1)})
    store_writer.manifest("registry.ollama.ai/me/mine/v1")
    checkpoint = open_checkpoint("ME/Mine:V1", store_writer.store)
    assert np.array([tensor.value.tolist() for tensor in checkpoint.tensors()]).tolist() == [[1]]


@pytest.mark.parametrize(
    "reference", ["", "a\0b", "~nobody-has-this-name/m", "x" * 10_000, "/nowhere/m", "./m", "a/b/c/d"]
)
def test_what_names_nothing_is_not_found(tmp_path: Path, reference: str):
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(reference, tmp_path)


def test_a_name_that_is_nowhere_says_where_was_looked(tmp_path: Path):
    with pytest.raises(
        ModelNotFoundError, match=r"'llama3:latest' not found in .*no file or folder.*`ollama pull llama3"
    ):
        open_checkpoint("llama3", tmp_path)


def test_a_store_cannot_be_left_by_a_name(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "latest").write_text('{"layers": []}')
    for name in ("../../../secret", "a/../../secret", "a:../../secret", "..", "a/../..:latest"):
        with pytest.raises((ModelNotFoundError, CheckpointError)) as caught:
            open_checkpoint(name, tmp_path / "store")
        assert "layers" not in str(caught.value)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither a config\.json"):
        open_checkpoint("empty", tmp_path / "store")
    with pytest.raises(CheckpointError, match=r"neither a config\.json"):
        open_checkpoint("./empty", tmp_path / "store")


@pytest.mark.parametrize(("name", "reason"), [("m.bin", "not a GGUF file"), ("m.safetensors", "name the folder")])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, reason: str):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(tmp_path / name), tmp_path)


def test_opening_and_reading_a_checkpoint_imports_no_mlx(parity: Path):
    references = [str(parity / name) for name in ("llama_gqa", "llama_gqa-Q4_0.gguf")]
    code = f"""
import sys
from pathlib import Path
from models.checkpoint import open_checkpoint
from models.weights.integers import integers
for reference in {references!r}:
    assert all(tensor.value.shape for tensor in open_checkpoint(reference, Path()).tensors())
assert not [name for name in sys.modules if name.partition(".")[0] == "mlx"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def damaged(data: bytes, hot: int, random: np.random.Generator) -> bytes:
    """The data with a byte changed, some cut out, or its end lost; `hot` is how much of its start is worth hitting."""
    at = int(random.integers(min(hot, len(data))))
    match random.integers(3):
        case 0:
            return data[:at] + random.bytes(1) + data[at + 1 :]
        case 1:
            return data[:at] + data[at + int(random.integers(1, 9)) :]
        case _:
            return data[:at]


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_damaged_file_is_an_error_or_a_model_but_never_a_crash(tmp_path: Path, parity: Path, kind: str):
    random = np.random.default_rng(17)
    if kind == "gguf":
        target = tmp_path / "m.gguf"
        whole = (parity / "llama_gqa-Q4_0.gguf").read_bytes()
        reference = str(target)
    else:
        target = hf_folder(tmp_path / "m") / "model.safetensors"
        arrays = {f"l{n}.weight": mx.ones((2, 8)) for n in range(4)}
        mx.save_safetensors(str(target), arrays)
        whole, reference = target.read_bytes(), str(target.parent)
    errors = 0
    for _ in range(200):
        target.write_bytes(damaged(whole, 700, random))
        try:
            for tensor in open_checkpoint(reference, tmp_path).tensors():
                assert tensor.value.shape
        except ModelError:
            errors += 1
    assert errors > 100
