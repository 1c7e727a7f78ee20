from pathlib import Path

import pytest

from models import backend
from models.gemm import few_rows_gemm, host_gemm

look_for_library = backend.few_rows_library.__wrapped__


def test_where_no_such_library_is_installed_the_other_blas_multiplies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "_library", lambda *_: None)
    assert look_for_library() is None
    monkeypatch.setattr("models.gemm.few_rows_library", look_for_library)
    found, other = few_rows_gemm(), host_gemm()
    assert (found is None) == (other is None or not other.has_batches)


def test_a_library_that_cannot_be_loaded_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "libscipy_openblas.so"
    file.write_text("no library")
    monkeypatch.setattr(backend, "_library", lambda *_: file)
    assert look_for_library() is None


def test_a_library_without_kernels_for_this_processor_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "FEW_ROWS_CORES", frozenset())
    assert look_for_library() is None


def test_threads_are_set_in_every_library_and_stay_as_asked():
    one: list[int] = []
    other: list[int] = []
    blas = backend.Blas("two", [one.append, other.append], threads=3)
    assert blas.settle() == 3
    assert one == other == [3]


def test_threads_nobody_asked_for_settle_at_what_the_machine_has_left(monkeypatch: pytest.MonkeyPatch):
    for variable in backend.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backend, "usable_cores", lambda: 4)
    monkeypatch.setattr(backend._CpuTimes, "others_busy_since", lambda *_: 2.6)
    said: list[int] = []
    blas = backend.Blas("one", [said.append], threads=None)
    assert blas.settle() == blas.threads == 1
    assert said == [4, 1]
