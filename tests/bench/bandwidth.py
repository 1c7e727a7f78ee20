"""How fast the processor can read memory: one line of JSON, bytes a second of some threads together."""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

ROUNDS = 4
Words = npt.NDArray[np.uint64]
READS: tuple[Callable[[Words], object], ...] = (
    np.bitwise_or.reduce,
    np.add.reduce,
    lambda array: array.view(np.float32).max(),
)
"""Of which one may be bound by its arithmetic: the best counts."""


def bytes_a_second(threads: int, nbytes: int) -> float:
    """The best of several streaming reads, each thread over an array of its own."""
    arrays = [np.ones(nbytes // 8, np.uint64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for read in READS * ROUNDS:
            begin = time.perf_counter()
            list(pool.map(read, arrays))
            best = max(best, threads * nbytes / (time.perf_counter() - begin))
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bandwidth", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mib", type=int, default=2048, help="of each thread's array")
    asked = parser.parse_args()
    print(json.dumps({"bytes_a_second": bytes_a_second(asked.threads, asked.mib << 20)}))
