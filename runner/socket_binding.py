"""The socket, bound long before it listens: a taken port is known before any model is read."""

import errno
import socket

from runner.errors import StartupError


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet: connecting to it is refused.

    Raises:
        StartupError: the port is taken or may not be used, or the host is not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise StartupError(f'the host "{host}" is unknown ({error}); --host is usually 127.0.0.1') from error
    listener = socket.socket(family, kind, protocol)
    try:
        # As Go does: a port whose last connections are still being closed is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise StartupError(_reason(error, host, port)) from error
    return listener


def _reason(error: OSError, host: str, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is taken; choose another --port or end the program that listens there"
        case errno.EACCES:
            return f"port {port} on {host} may not be used by this user; choose a --port above 1023"
        case errno.EADDRNOTAVAIL:
            return f"{host} is no address of this machine; --host is usually 127.0.0.1"
        case _:
            return f"cannot bind port {port} on {host}: {error.strerror}; choose another --port"
