import subprocess
import sys

import pytest

KEPT = """
import ctypes
from pathlib import Path
from models import process_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def cost_of_a_freed_block():
    before = resident()
    block = libc.malloc(256 << 20)
    ctypes.memset(block, 1, 256 << 20)
    libc.free(block)
    return resident() - before

given_back = cost_of_a_freed_block()
process_memory.keep_freed()
kept = cost_of_a_freed_block()
before = resident()
process_memory.trim()
print(given_back, kept, before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="nothing happens elsewhere")
def test_freed_memory_is_kept_where_that_is_wanted_and_trimmed_when_it_is_asked():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=60, check=True)
    given_back, kept, trimmed = map(int, done.stdout.split())
    assert given_back < 32
    assert kept > 200
    assert trimmed > 200


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    from models import process_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    asked = []
    monkeypatch.setattr(process_memory.ctypes, "CDLL", asked.append)
    process_memory.trim()
    process_memory.keep_freed()
    assert asked == []
