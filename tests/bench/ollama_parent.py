"""What a real Ollama adds to a token: the same child asked through its parent and directly, by turns.

Needs `make ollama` and Ollama's Python client; `make bench-ollama` sees to both. The clock is on the reader's
side, from the first piece of text to the last.

    python -m tests.bench.ollama_parent [--rounds N] [--tokens N]
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from runner.default_model import fetch
from runner.folders import cache_folder
from tests.ollama.programs import VERSIONS
from tests.ollama.server import Server
from tests.ollama.store import Store

PROMPT = "Once upon a time, in a village by the sea, there lived"
MODEL = "smol"


def options(tokens):
    """The same sampling for both: greedy, no penalties, no early end."""
    return {"temperature": 0, "num_predict": tokens, "repeat_penalty": 1.0, "seed": 1}


async def timed(pieces):
    """Pieces a second after the first of a stream that ends by itself."""
    first = last = None
    count = 0
    async for text in pieces:
        if text:
            count += 1
            last = time.perf_counter()
            first = last if first is None else first
    return (count - 1) / (last - first)


async def through_parent(session, address, tokens):
    """The parent's answer, piece by piece."""
    asked = {"model": MODEL, "prompt": PROMPT, "raw": True, "options": options(tokens)}
    async with session.post(f"http://{address}/api/generate", json=asked) as response:
        async for line in response.content:
            yield json.loads(line)["response"]


async def from_child(session, port, tokens):
    """The child's own answer, piece by piece."""
    asked = {"Prompt": PROMPT, "Options": options(tokens)}
    async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=asked) as response:
        async for line in response.content:
            yield json.loads(line)["Content"]


async def measure(address, port_of, rounds, tokens):
    """The rates of both in each round, after one that does not count."""
    rates = []
    async with aiohttp.ClientSession() as session:
        await timed(through_parent(session, address, 8))
        port = port_of()
        for _ in range(rounds):
            parent = await timed(through_parent(session, address, tokens))
            child = await timed(from_child(session, port, tokens))
            rates.append((parent, child))
            print(f"through Ollama {parent:.1f} tok/s | at the runner {child:.1f} tok/s", flush=True)
    return rates


def port_of(child):
    """The port in a runner's command line."""
    words = child.cmdline()
    return int(words[words.index("--port") + 1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    asked = parser.parse_args()
    model = fetch(cache_folder(os.environ), lambda _: None)
    for version in (VERSIONS["images"], VERSIONS["newest"]):
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "models")
            store.add(MODEL, model)
            with Server(version, store, folder) as server:
                address = server.address
                rates = asyncio.run(measure(address, lambda s=server: port_of(s.child()), asked.rounds, asked.tokens))
        ratios = [parent / child for parent, child in rates]
        middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
        print(f"Ollama {version}: {middle:.2f} of the runner's own rate ({least:.2f} to {most:.2f})")


if __name__ == "__main__":
    main()
