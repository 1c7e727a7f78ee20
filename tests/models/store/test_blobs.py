"""The store as a place to write: what a manifest does not name does not stay."""

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from models.errors import StoreError
from models.sources.model_name import ModelName
from models.store.blobs import named_blobs, store_writer
from models.store.content import Content

from .conftest import files_of

NAME = ModelName.parse("m")


def content(text: str) -> Content:
    return Content((text.encode(),))


def test_a_blob_is_named_by_its_digest_and_found_again(store):
    with store_writer(store) as writer:
        first = writer.add(content("hello"), "type", "name")
        again = writer.add(content("hello"), "type", "name")
        writer.publish(NAME, first, [again])
    digest = hashlib.sha256(b"hello").hexdigest()
    assert first == again
    assert (first.digest, first.size) == (f"sha256:{digest}", 5)
    assert files_of(store)[f"blobs/sha256-{digest}"] == b"hello"
    assert named_blobs(store) == ({f"sha256-{digest}"}, True)


def test_what_was_added_and_never_published_goes(store):
    with store_writer(store) as writer:
        writer.add(content("hello"), "type")
    assert not store.exists()


def test_a_blob_that_another_model_has_come_to_name_stays(store):
    with store_writer(store) as writer:
        kept = writer.add(content("kept"), "type")
        writer.publish(NAME, kept, [])
        writer.add(content("lost"), "type")
    assert set(files_of(store).values()) > {b"kept"}
    assert b"lost" not in files_of(store).values()


def test_a_manifest_is_not_written_over_a_blob_that_has_gone(store):
    with store_writer(store) as writer:
        layer = writer.add(content("hello"), "type")
        (store / "blobs" / layer.digest.replace(":", "-")).unlink()
        with pytest.raises(StoreError, match="somebody removed or changed this blob"):
            writer.publish(NAME, layer, [])
    assert not store.exists()


def test_a_blob_that_is_used_again_is_young_again(store):
    with store_writer(store) as writer:
        layer = writer.add(content("hello"), "type")
        writer.publish(NAME, layer, [])
    path = store / "blobs" / layer.digest.replace(":", "-")
    os.utime(path, (0, 0))
    with store_writer(store) as writer:
        writer.publish(NAME, writer.add(content("hello"), "type"), [])
    assert path.stat().st_mtime > 0


def test_what_a_killed_writer_left_half_written_goes_and_partial_downloads_stay(store):
    blobs = store / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "sha256-create-00").write_text("x")
    (blobs / f"sha256-{'0' * 64}-partial").write_text("y")
    with store_writer(store):
        pass
    assert [path.name for path in blobs.iterdir()] == [f"sha256-{'0' * 64}-partial"]


def test_an_existing_empty_folder_is_not_ours_to_remove(store):
    store.mkdir()
    with store_writer(store):
        pass
    assert store.is_dir()
    assert not (store / "blobs").exists()


def test_reusable_bytes_are_counted_by_size_once_each(store):
    with store_writer(store) as writer:
        writer.publish(NAME, writer.add(content("12345"), "type"), [writer.add(content("abcde"), "type")])
    with store_writer(store) as writer:
        assert writer.reusable_bytes([5, 5, 5, 7]) == 10


def test_a_store_may_be_a_link(store, tmp_path: Path):
    (tmp_path / "real").mkdir()
    store.symlink_to(tmp_path / "real")
    with store_writer(store) as writer:
        writer.publish(NAME, writer.add(content("x"), "type"), [])
    assert len(files_of(tmp_path / "real")) == 2


def test_a_blob_of_equal_size_and_other_content_is_written(store):
    with store_writer(store) as writer:
        writer.publish(NAME, writer.add(content("12345"), "type"), [writer.add(content("abcde"), "type")])
    assert {b"12345", b"abcde"} < set(files_of(store).values())


def test_a_file_system_without_locks_lets_several_write(store, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with store_writer(store) as first, store_writer(store) as second:
        half = store / "blobs" / "sha256-create-00"
        half.write_text("somebody else may be writing this")
        layer = first.add(content("hello"), "type")
        second.publish(NAME, second.add(content("hello"), "type"), [layer])
    assert half.exists()
    assert b"hello" in files_of(store).values()
