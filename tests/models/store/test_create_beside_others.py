"""A store that holds models already: what a new one shares with them, replaces, and leaves alone."""

import mlx.core as mx
import pytest

from models.errors import CheckpointError, StoreError
from models.store import CreateRequest, create_model

from .conftest import config_of, create, files_of, manifest_of, write_folder


def test_the_same_tensor_is_stored_once_for_all_models(parity, store):
    create(parity / "llama_gqa", store, "one")
    before = set(files_of(store))
    create(parity / "llama_gqa", store, "two")
    (new,) = set(files_of(store)) - before
    assert new.endswith("two/latest")


def test_a_blob_that_is_there_is_not_written_again_and_a_damaged_one_is(parity, store):
    create(parity / "llama_gqa", store)
    whole = files_of(store)
    blobs = sorted((store / "blobs").iterdir())
    inodes = {path: path.stat().st_ino for path in blobs}
    damaged = blobs[3]
    damaged.write_bytes(bytes(byte ^ 255 for byte in damaged.read_bytes()))
    create(parity / "llama_gqa", store)
    assert files_of(store) == whole
    kept = [path for path in blobs if path.stat().st_ino == inodes[path]]
    assert set(blobs) - set(kept) <= {damaged}
    assert len(kept) >= len(blobs) - 1


def test_creating_a_name_anew_takes_away_what_only_the_old_model_had(parity, store):
    create(parity / "llama_gqa", store)
    create(parity / "qwen3", store, "other")
    create(parity / "qwen3", store)
    fresh = store.with_name("fresh")
    create(parity / "qwen3", fresh)
    create(parity / "qwen3", fresh, "other")
    assert files_of(store) == files_of(fresh)


def test_nothing_is_taken_away_while_a_manifest_cannot_be_read(parity, store):
    create(parity / "llama_gqa", store)
    before = set((store / "blobs").iterdir())
    other = store / "manifests/registry.ollama.ai/library/other/latest"
    other.parent.mkdir()
    other.write_text("{")
    create(parity / "qwen3", store)
    assert before <= set((store / "blobs").iterdir())


def test_another_format_is_replaced_only_by_force(parity, store):
    create(parity / "llama_gqa.gguf", store)
    before = files_of(store)
    with pytest.raises(StoreError, match=r"m:latest is .* a model of another format \(GGUF\); --force"):
        create(parity / "llama_gqa", store)
    assert files_of(store) == before
    create(parity / "llama_gqa", store, force=True)
    assert config_of(store, "m")["model_format"] == "safetensors"


def test_a_damaged_manifest_is_replaced_only_by_force(parity, store):
    create(parity / "qwen3", store)
    manifest = store / "manifests/registry.ollama.ai/library/m/latest"
    manifest.write_text("[")
    with pytest.raises(StoreError, match="whose description is damaged; --force"):
        create(parity / "qwen3", store)
    create(parity / "qwen3", store, force=True)
    assert manifest_of(store, "m")["schemaVersion"] == 2


def test_a_name_that_is_there_in_another_case_is_that_model(parity, store):
    create(parity / "qwen3", store, "Qwen")
    create(parity / "qwen3", store, "qWEN")
    assert [path.name for path in (store / "manifests/registry.ollama.ai/library").iterdir()] == ["Qwen"]


def test_a_failed_create_leaves_the_other_models_as_they_were(parity, tmp_path, store):
    create(parity / "qwen3", store, "other")
    before = files_of(store)
    source = write_folder(tmp_path / "source", {f"t{n}": mx.full(16, n) for n in range(9)})

    def fail(fraction: float) -> None:
        if fraction > 0.5:
            raise CheckpointError("enough", file="here")

    with pytest.raises(CheckpointError, match="enough"):
        create_model(CreateRequest("m", source, store), progress=fail)
    assert files_of(store) == before
    assert not (store / "manifests/registry.ollama.ai/library/m").exists()
