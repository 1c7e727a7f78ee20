"""What ranks say to each other besides tensors: JSON, an object or a list a line, over TCP.

A rank that connects and the first one both show that they know the secret which the first one gave out when it started
the others; nobody else's connection is kept. Nothing is encrypted, as MLX's own connections are not.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
from typing import Any

LONGEST_LINE = 64 << 20
HANDSHAKE_S = 5.0


class Line:
    """A connection of lines. Thread: one reads, any write."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = connection.makefile("rb")
        self._lock = threading.Lock()

    def say(self, value: object) -> None:
        """Write a line. Raises OSError."""
        text = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._socket.sendall(text)

    def hear(self, timeout_s: float | None = None) -> Any:  # noqa: ANN401 - JSON's edge
        """Wait for a line; None at the end of all.

        Raises:
            OSError: the connection broke, or nothing came in that time.
            ValueError: it is not JSON.
        """
        self._socket.settimeout(timeout_s)
        line = self._reader.readline(LONGEST_LINE)
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        """End it, and who waits for a line. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(address: tuple[str, int], secret: str, rank: int, purpose: str, timeout_s: float) -> Line:
    """Connect as a rank, and have the first one show that it is the one.

    Raises:
        OSError: nobody is there, or somebody who does not know the secret.
    """
    line = Line(socket.create_connection(address, timeout_s))
    challenge = line.hear(HANDSHAKE_S)
    own = secrets.token_hex(16)
    line.say({"rank": rank, "purpose": purpose, "proof": _proof(secret, f"{challenge}{rank}{purpose}"), "nonce": own})
    if line.hear(HANDSHAKE_S) != _proof(secret, own):
        line.close()
        raise ConnectionRefusedError("whoever listens there does not know the secret of this model's ranks")
    return line


def accept(connection: socket.socket, secret: str) -> tuple[int, str, Line] | None:
    """The rank, the purpose and the line of who connects; None: it does not know the secret, and is let go."""
    line = Line(connection)
    challenge = secrets.token_hex(16)
    try:
        line.say(challenge)
        match line.hear(HANDSHAKE_S):
            case {"rank": int(rank), "purpose": str(purpose), "proof": str(proof), "nonce": str(nonce)}:
                if hmac.compare_digest(proof, _proof(secret, f"{challenge}{rank}{purpose}")):
                    line.say(_proof(secret, nonce))
                    return rank, purpose, line
    except (OSError, ValueError):
        pass
    line.close()
    return None


def _proof(secret: str, challenge: str) -> str:
    return hmac.new(secret.encode(), challenge.encode(), hashlib.sha256).hexdigest()
