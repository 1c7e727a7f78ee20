"""Stands between a parent and the runner and keeps the bodies of what the parent posts, byte for byte.

Named in OLLAMA_MLX_RUNNER. OLLAMA_MLX_RUNNER_RECORDED is the runner, OLLAMA_MLX_RUNNER_RECORD the folder to fill with
`PID.argv`, and with `PID-NNN-PATH.request` and `.answer` (the latter with HTTP's headers and chunks) for each request.
"""

import asyncio
import os
import re
import signal
import socket
import sys
from itertools import count
from pathlib import Path

FOLDER = Path(os.environ.get("OLLAMA_MLX_RUNNER_RECORD", ""))
NUMBERS = count()
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Exchange:
    """One connection; HTTP's requests follow one another on it, each after the answer to the one before."""

    def __init__(self):
        self.stem = None

    async def to_runner(self, reader, writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(head)
            body = await reader.readexactly(int(length[1])) if length else b""
            path = head.split()[1].decode().strip("/").replace("/", "-")
            self.stem = f"{os.getpid()}-{next(NUMBERS):03}-{path}" if head.startswith(b"POST") else None
            self.keep("request", body)
            writer.write(head + body)
            await writer.drain()

    async def to_parent(self, reader, writer):
        while data := await reader.read(65536):
            self.keep("answer", data)
            writer.write(data)
            await writer.drain()

    def keep(self, suffix, data):
        if self.stem:
            with (FOLDER / f"{self.stem}.{suffix}").open("ab") as file:
                file.write(data)


async def listen(port, runner_port):
    async def connected(reader, writer):
        try:
            runner_reader, runner_writer = await asyncio.open_connection("127.0.0.1", runner_port)
        except OSError:
            # It does not listen yet; the parent will ask again.
            writer.close()
            return
        exchange = Exchange()
        ways = {
            asyncio.create_task(exchange.to_runner(reader, runner_writer)),
            asyncio.create_task(exchange.to_parent(runner_reader, writer)),
        }
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, runner_writer):
            end.close()
        await asyncio.gather(*ways, return_exceptions=True)

    return await asyncio.start_server(connected, "127.0.0.1", port)


async def main(argv):
    place = argv.index("--port") + 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        runner_port = free.getsockname()[1]
    server = await listen(int(argv[place]), runner_port)
    argv[place] = str(runner_port)
    runner = await asyncio.create_subprocess_exec(os.environ["OLLAMA_MLX_RUNNER_RECORDED"], *argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, runner.send_signal, number)
    async with server:
        return await runner.wait()


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{os.getpid()}.argv").write_text("\0".join(sys.argv[1:]))
    sys.exit(asyncio.run(main(sys.argv[1:])))
