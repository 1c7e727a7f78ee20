import pytest

from models.image import blas


def test_threads_stay_as_asked():
    said: list[int] = []
    library = blas.Blas("one", said.append, threads=3)
    assert library.settle() == 3
    assert set(said) == {3}


def test_threads_nobody_asked_for_settle_at_what_the_machine_has_left(monkeypatch: pytest.MonkeyPatch):
    for variable in blas.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(blas, "usable_cores", lambda: 4)
    monkeypatch.setattr(blas._CpuTimes, "others_busy_since", lambda *_: 2.6)
    said: list[int] = []
    library = blas.Blas("one", said.append, threads=None)
    assert library.settle() == library.threads == 1
    assert said == [4, 1]
