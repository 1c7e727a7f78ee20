import os
import shutil
from pathlib import Path

from models.checkpoint import open_checkpoint
from models.fingerprint import fingerprint


def of(folder: Path, *form: str) -> str:
    return fingerprint(open_checkpoint(str(folder), store=folder), *form)


def test_the_same_files_in_the_same_form_have_the_same_fingerprint(tiny_llama: Path):
    assert of(tiny_llama, "a") == of(tiny_llama, "a")
    assert len({of(tiny_llama), of(tiny_llama, "a"), of(tiny_llama, "b"), of(tiny_llama, "a", "b")}) == 4


def test_other_weights_or_another_configuration_have_another(tiny_llama: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_llama, folder)
    seen = {of(tiny_llama), of(folder)}
    os.utime(folder / "model.safetensors", ns=(1, 1))
    seen.add(of(folder))
    config = folder / "config.json"
    config.write_text(config.read_text().replace("10000.0", "20000.0"))
    seen.add(of(folder))
    assert len(seen) == 4


def test_a_gguf_file_has_one_too(parity: Path):
    assert of(parity / "llama_gqa-Q8_0.gguf") != of(parity / "llama_gqa")
