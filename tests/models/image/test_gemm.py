import threading

import numpy as np
import pytest

from models.image.gemm import Crew, Gemm, chunks, host_gemm


@pytest.fixture(scope="module")
def gemm() -> Gemm:
    found = host_gemm()
    assert found is not None, "the tests run with the BLAS that is installed"
    return found


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).normal(size=shape).astype(np.float32)


def test_a_product_is_numpys(gemm: Gemm):
    a, b, out = draw(5, 7), draw(7, 3), np.full((5, 3), np.nan, np.float32)
    gemm.multiply(a, b, out)
    np.testing.assert_allclose(out, a @ b, rtol=1e-5, atol=1e-6)
    gemm.multiply(a, b, out, accumulate=True)
    np.testing.assert_allclose(out, 2 * (a @ b), rtol=1e-5, atol=1e-6)


def test_rows_may_lie_apart(gemm: Gemm):
    a, b, out = draw(5, 20)[:, 4:11], draw(7, 9)[:, 2:5], np.zeros((5, 8), np.float32)
    gemm.multiply(a, b, out[:, 1:4])
    np.testing.assert_allclose(out[:, 1:4], a @ b, rtol=1e-5, atol=1e-6)
    assert not out[:, 0].any()
    assert not out[:, 4:].any()


def test_the_second_matrix_may_be_transposed(gemm: Gemm):
    a, b, out = draw(5, 7), draw(4, 9)[:, :7], np.empty((5, 4), np.float32)
    gemm.multiply(a, b, out, transpose_b=True)
    np.testing.assert_allclose(out, a @ b.T, rtol=1e-5, atol=1e-6)


def test_stacks_are_multiplied_matrix_by_matrix(gemm: Gemm):
    a, b, out = draw(6, 5, 7), draw(6, 7, 3), np.empty((6, 5, 3), np.float32)
    gemm.multiply_stacks(a, b, out)
    np.testing.assert_allclose(out, a @ b, rtol=1e-5, atol=1e-6)


def test_a_crew_does_every_item_once_and_gives_the_threads_back(gemm: Gemm):
    before = gemm.threads
    try:
        gemm.set_threads(2)
        if gemm.threads < 2:
            pytest.skip("the BLAS takes no more than one thread here")
        done: list[int] = []
        workers: set[int] = set()
        with Crew(gemm) as crew:
            assert crew.size == 2
            assert gemm.threads == 1
            # Two items that wait for each other are with two workers.
            meeting = threading.Barrier(2, timeout=30)

            def work(worker: int, item: int) -> None:
                if item < 2:
                    meeting.wait()
                workers.add(worker)
                done.append(item)

            crew.share(work, range(100))
        assert sorted(done) == list(range(100))
        assert workers == {0, 1}
        assert gemm.threads == 2
    finally:
        gemm.set_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_work_raises_comes_out_and_the_threads_are_given_back(gemm: Gemm, threads: int):
    before = gemm.threads

    def work(worker: int, item: int) -> None:
        raise ZeroDivisionError(str(item))

    try:
        gemm.set_threads(threads)
        set_before = gemm.threads
        with pytest.raises(ZeroDivisionError), Crew(gemm) as crew:
            crew.share(work, [1])
        assert gemm.threads == set_before
    finally:
        gemm.set_threads(before)


@pytest.mark.parametrize(("total", "size"), [(1, 5), (10, 10), (10, 3), (11, 4), (7, 1)])
def test_chunks_cover_everything_and_differ_by_one_at_most(total: int, size: int):
    parts = chunks(total, size)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(total))
    lengths = {part.stop - part.start for part in parts}
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
