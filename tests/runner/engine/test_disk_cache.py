"""Blocks in files: what comes back, what is thrown away, and what a hostile folder may do."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from runner.engine import disk_cache as module
from runner.engine.disk_cache import BLOCK_TOKENS, DiskCache, ReadSegment, blocks
from tests.runner.engine.disk import LIMIT, MODEL, Open, files

TOKENS = list(range(1000, 1000 + 3 * BLOCK_TOKENS + 5))
TYPES = ("float32", "float16", "uint8", "int8", "uint16", "uint32", "int32")


@dataclass(frozen=True)
class Told:
    """A segment of an array of each type, that say whose they are."""

    held: Mapping[str, np.ndarray]

    @property
    def length(self) -> int:
        return self.held["0.float32"].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.held.values())

    def part(self, begin: int, end: int) -> "Told":
        return Told({name: array[:, begin:end] for name, array in self.held.items()})

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self.held.items()


def segment_of(tokens: Sequence[int], begin: int, end: int) -> Told:
    own = np.array(tokens[begin:end])[None, :, None] + np.arange(3)
    # Not in one piece: as a slot's part is.
    return Told({f"{number}.{name}": own.astype(name)[:, :, :2] for number, name in enumerate(TYPES)})


def read_segment(arrays: Mapping[str, np.ndarray], length: int) -> Told:
    assert length == BLOCK_TOKENS
    if len(arrays) != len(TYPES):
        raise ValueError("its arrays are not those of this model's layers")
    return Told(arrays)


def write(cache: DiskCache, tokens: Sequence[int]) -> None:
    """Write a row, and wait until the files are there."""
    cache.write(tokens, lambda begin, end: segment_of(tokens, begin, end))
    cache.close()


def found_until(cache: DiskCache, tokens: Sequence[int], begin: int = 0) -> int:
    return max((end for end, _ in cache.read(tokens, begin, read_segment)), default=begin)


def test_another_process_finds_whole_blocks_to_the_last_bit(opened: Open):
    write(opened(), TOKENS)
    found = list(opened().read(TOKENS, 0, read_segment))
    assert [end for end, _ in found] == [BLOCK_TOKENS, 2 * BLOCK_TOKENS, 3 * BLOCK_TOKENS]
    for end, segment in found:
        expected = segment_of(TOKENS, end - BLOCK_TOKENS, end)
        for (name, got), (expected_name, array) in zip(segment.arrays(), expected.arrays(), strict=True):
            assert (name, got.dtype, got.shape) == (expected_name, array.dtype, array.shape)
            assert got.tobytes() == array.tobytes()


def test_reading_begins_at_the_block_that_holds_the_first_token_asked_for(opened: Open):
    write(opened(), TOKENS)
    cache = opened()
    ends = [end for end, _ in cache.read(TOKENS, BLOCK_TOKENS + 1, read_segment)]
    assert ends == [2 * BLOCK_TOKENS, 3 * BLOCK_TOKENS]
    assert [end for end, _ in cache.read(TOKENS, 3 * BLOCK_TOKENS, read_segment)] == []


def test_a_block_counts_only_behind_the_same_tokens(opened: Open):
    write(opened(), TOKENS)
    cache = opened()
    assert found_until(cache, [1, *TOKENS[1:]]) == 0
    assert found_until(cache, [*TOKENS[:BLOCK_TOKENS], 1, *TOKENS[BLOCK_TOKENS + 1 :]]) == BLOCK_TOKENS
    assert found_until(cache, TOKENS[: BLOCK_TOKENS - 1]) == 0


def test_models_do_not_see_each_other(opened: Open):
    write(opened(), TOKENS)
    assert found_until(opened(model="another"), TOKENS) == 0


def test_the_files_are_safetensors_that_others_can_read(opened: Open, tmp_path: Path):
    write(opened(), TOKENS[:BLOCK_TOKENS])
    (file,) = files(tmp_path)
    with safetensors.safe_open(file, "numpy") as stored:
        assert stored.metadata()["format"] == module.FORMAT
        assert stored.get_tensor("tokens").tolist() == TOKENS[:BLOCK_TOKENS]
        assert stored.get_tensor("1.float16").shape == (1, BLOCK_TOKENS, 2)


def test_only_the_owner_may_read_what_people_said(opened: Open, tmp_path: Path):
    write(opened(), TOKENS)
    assert {path.stat().st_mode & 0o077 for path in files(tmp_path)} == {0}
    assert (tmp_path / MODEL).stat().st_mode & 0o077 == 0


def test_what_is_there_is_not_copied_again(opened: Open):
    write(opened(), TOKENS)
    asked = []
    opened().write(TOKENS, lambda begin, end: asked.append(begin))
    assert asked == []


def test_a_row_that_lost_a_part_is_written_up_to_there(opened: Open, tmp_path: Path):
    cache = opened()
    cache.write(TOKENS, lambda begin, end: segment_of(TOKENS, begin, end) if begin < BLOCK_TOKENS else None)
    cache.close()
    assert found_until(opened(), TOKENS) == BLOCK_TOKENS


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 4
    file.write_bytes(raw)


def scribble(file: Path) -> None:
    file.write_bytes(os.urandom(3000))


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, scribble])
def test_a_damaged_file_is_warned_of_once_removed_and_written_again(
    opened: Open, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    write(opened(), TOKENS)
    names = [block.name for block in blocks(TOKENS)]
    for name in names[1:]:
        damage(tmp_path / MODEL / name)
    cache = opened()
    assert found_until(cache, TOKENS) == BLOCK_TOKENS
    assert found_until(cache, TOKENS) == BLOCK_TOKENS
    assert found_until(cache, TOKENS, 2 * BLOCK_TOKENS) == 2 * BLOCK_TOKENS
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert [path.name for path in files(tmp_path)] == [names[0]]
    write(cache := opened(), TOKENS)
    assert found_until(cache, TOKENS) == 3 * BLOCK_TOKENS


def test_a_sound_file_of_somebody_else_is_neither_used_nor_removed(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cache = opened()
    names = [block.name for block in blocks(TOKENS)]
    foreign = tmp_path / MODEL / names[0]
    safetensors.numpy.save_file({"tokens": np.zeros(3, dtype=np.float32)}, foreign)
    other = tmp_path / MODEL / "notes.txt"
    other.write_text("mine")
    assert found_until(cache, TOKENS) == 0
    assert "not the cache's own" in caplog.text
    write(cache, TOKENS)
    assert foreign.exists()
    assert other.read_text() == "mine"


def refuse(arrays: Mapping[str, np.ndarray], length: int) -> Told:
    raise ValueError("its heads are narrower")


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (refuse, "its heads are narrower"),
    ],
)
def test_what_the_executor_cannot_use_is_not_the_caches_own(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, read: ReadSegment, reason: str
):
    write(opened(), TOKENS)
    assert list(opened().read(TOKENS, 0, read)) == []
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "not the cache's own" in warning.message
    assert warning.fields["reason"] == reason
    assert len(files(tmp_path)) == 3


def test_an_array_of_a_type_that_no_segment_has_is_not_the_caches_own(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write(opened(), TOKENS[:BLOCK_TOKENS])
    (file,) = files(tmp_path)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"I8"', b'"BOOL"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert found_until(opened(), TOKENS) == 0
    assert "not the cache's own" in caplog.text
    assert file.exists()


def test_a_file_under_a_wrong_name_is_not_believed(opened: Open, tmp_path: Path):
    write(opened(), TOKENS)
    first, second, _ = (tmp_path / MODEL / block.name for block in blocks(TOKENS))
    first.write_bytes(second.read_bytes())
    assert found_until(opened(), TOKENS) == 0


def test_the_longest_unused_row_goes_first_and_a_rows_end_before_its_beginning(opened: Open, tmp_path: Path):
    rows = [[number, *TOKENS[1:]] for number in range(4)]
    write(opened(), rows[0])
    size = sum(path.stat().st_size for path in files(tmp_path))
    write(opened(), rows[1])
    # Looking at a row is using it.
    cache = opened()
    assert found_until(cache, rows[0]) == 3 * BLOCK_TOKENS
    cache.close()
    write(opened(limit_bytes=int(2.5 * size)), rows[2])
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 2.5 * size
    cache = opened()
    depths = [found_until(cache, row) for row in rows]
    assert depths[0] == depths[2] == 3 * BLOCK_TOKENS
    assert depths[1] < 3 * BLOCK_TOKENS
    left = sum(path.stat().st_size for path in files(tmp_path)) // (size // 3)
    assert sum(depths) == left * BLOCK_TOKENS, "a block outlived one that it rests on"


def test_the_limit_is_for_all_models_together(opened: Open, tmp_path: Path):
    write(opened(), TOKENS)
    size = sum(path.stat().st_size for path in files(tmp_path))
    write(opened(limit_bytes=size, model="another"), TOKENS)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= size
    assert found_until(opened(model="another"), TOKENS) > 0


def test_what_dead_writers_left_is_cleared_and_what_living_ones_make_is_not(opened: Open, tmp_path: Path):
    folder = tmp_path / MODEL
    folder.mkdir()
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    names = [f".{'a' * 32}.{pid}.0123abcd.part" for pid in (int(gone.stdout), os.getppid(), 1)]
    for name in names:
        (folder / name).write_bytes(b"half")
    os.utime(folder / names[2], (0, 0))
    opened().close()
    assert [path.name for path in files(tmp_path)] == [names[1]]


def test_closing_writes_what_waits(opened: Open, tmp_path: Path):
    cache = opened()
    cache.write(TOKENS, lambda begin, end: segment_of(TOKENS, begin, end))
    cache.close()
    assert len(files(tmp_path)) == 3
    assert not any(thread.name == "prefix writer" for thread in threading.enumerate())


def test_closing_does_not_wait_for_a_slow_disk_and_leaves_no_half_file(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reached, go_on = threading.Event(), threading.Event()
    write_fully = module._write_fully

    def slow(file, piece):
        reached.set()
        assert go_on.wait(30)
        write_fully(file, piece)

    monkeypatch.setattr(module, "_write_fully", slow)
    monkeypatch.setattr(module, "DRAIN_S", 0.01)
    cache = opened()
    cache.write(TOKENS, lambda begin, end: segment_of(TOKENS, begin, end))
    assert reached.wait(30)
    stop = cache._stop
    threading.Thread(target=lambda: (stop.wait(30), go_on.set())).start()
    cache.close()
    assert files(tmp_path) == []


def test_a_full_disk_is_warned_of_once_and_costs_nothing_else(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(file, piece):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_fully", full)
    write(opened(), TOKENS)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "the prefix cache cannot be written"
    ]
    assert files(tmp_path) == []


def test_more_than_may_wait_is_left_out(opened: Open, monkeypatch: pytest.MonkeyPatch):
    held = threading.Event()
    monkeypatch.setattr(DiskCache, "_do", lambda self, job: held.wait(30))
    monkeypatch.setattr(module, "MAX_PENDING_BYTES", 1)
    cache, asked = opened(), []

    def copy(begin: int, end: int) -> Told:
        asked.append(begin)
        return segment_of(TOKENS, begin, end)

    cache.write(TOKENS, copy)
    cache.write(TOKENS, copy)
    held.set()
    assert asked == [0]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        DiskCache(tmp_path / "file", MODEL, limit_bytes=LIMIT)


def test_two_that_write_the_same_at_once_leave_whole_files(opened: Open, tmp_path: Path):
    caches = [opened() for _ in range(2)]
    rows = [[number, *TOKENS[1:]] for number in range(10)]
    for row in rows:
        for cache in caches:
            cache.write(row, lambda begin, end, row=row: segment_of(row, begin, end))
    for cache in caches:
        cache.close()
    assert len(files(tmp_path)) == 3 * len(rows)
    assert [found_until(caches[0], row) for row in rows] == [3 * BLOCK_TOKENS] * len(rows)
