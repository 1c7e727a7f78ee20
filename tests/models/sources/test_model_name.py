from pathlib import Path

import pytest

from models.errors import ModelNotFoundError
from models.sources.model_name import ModelName


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("llama3.2", ("registry.ollama.ai", "library", "llama3.2", "latest")),
        ("llama3.2:1b-instruct-q4_0", ("registry.ollama.ai", "library", "llama3.2", "1b-instruct-q4_0")),
        ("me/mine", ("registry.ollama.ai", "me", "mine", "latest")),
        ("hf.co/org/Repo-GGUF:Q4_K_M", ("hf.co", "org", "Repo-GGUF", "Q4_K_M")),
        ("localhost:5000/me/mine:x", ("localhost:5000", "me", "mine", "x")),
        ("localhost:5000/me/mine", ("localhost:5000", "me", "mine", "latest")),
        ("https://host/me/mine", ("host", "me", "mine", "latest")),
        ("_x/_y:_z", ("registry.ollama.ai", "_x", "_y", "_z")),
    ],
)
def test_a_name_is_filled_in_from_the_defaults(text: str, parts: tuple[str, str, str, str]):
    name = ModelName.parse(text)
    assert (name.host, name.namespace, name.model, name.tag) == parts


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "a:", ":b", "/", "a/", "/a", "//a", "a//b", "..", "../a", "a/../b", "../../etc/passwd", "a/b/.."),
        *("a:../x", "a:..", ".hidden", "-a", "a b", "a@sha256:00", "a\n", "a/b.c/d/e", "b.c/d", "é", "a\x00"),
        *("x" * 81, "a:" + "t" * 81, "h/../a/b", "%2e%2e/a", "a\\b"),
    ],
)
def test_what_is_no_name_is_refused_and_never_leads_out_of_the_store(text: str):
    with pytest.raises(ModelNotFoundError):
        ModelName.parse(text)


def test_a_name_is_shown_without_the_defaults():
    shown = [str(ModelName.parse(text)) for text in ("a", "me/a:x", "hf.co/me/a")]
    assert shown == ["a:latest", "me/a:x", "hf.co/me/a:latest"]


def put(store: Path, path: str) -> Path:
    file = store / "manifests" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def test_case_does_not_matter_unless_two_spellings_are_there(tmp_path: Path):
    lower = put(tmp_path, "hf.co/org/repo-gguf/q4_k_m")
    assert ModelName.parse("hf.co/Org/Repo-GGUF:Q4_K_M").manifest(tmp_path) == lower
    exact = put(tmp_path, "hf.co/Org/Repo-GGUF/Q4_K_M")
    assert ModelName.parse("hf.co/Org/Repo-GGUF:Q4_K_M").manifest(tmp_path) == exact


def test_a_store_without_the_model_has_no_manifest(tmp_path: Path):
    put(tmp_path, "registry.ollama.ai/library/a/latest")
    assert ModelName.parse("a:other").manifest(tmp_path) is None
    assert ModelName.parse("a").manifest(tmp_path / "nowhere") is None
