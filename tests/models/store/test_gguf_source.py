from pathlib import Path

import gguf
import pytest

from models.store.gguf_source import plan_gguf

ENDING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token if m.role != 'user' }}{% endfor %}"


def templates(path: Path, eos: int | None) -> list[str]:
    """What is written for a model whose answers end with a token that its template calls by its name."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(["a", "b", "</s>"])
    if eos is not None:
        writer.add_eos_token_id(eos)
    writer.add_chat_template(ENDING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    layers = [layer for layer in plan_gguf(path, None, None).layers if layer.media_type.endswith(".template")]
    return [b"".join(layer.content.chunks()).decode() for layer in layers]


def test_the_token_that_ends_an_answer_is_found_by_its_number(tmp_path: Path):
    (text,) = templates(tmp_path / "m.gguf", 2)
    assert 'eq $last "a" }}</s>[user]{{ end }}' in text


@pytest.mark.parametrize("eos", [None, 3])
def test_without_that_token_the_template_is_not_translated(tmp_path: Path, eos: int | None):
    assert templates(tmp_path / "m.gguf", eos) == []
