"""Binding without listening, and what is said when it fails."""

import errno
import os
import socket

import pytest
from aiohttp import web

from runner.errors import StartupError
from runner.serve import _listen
from runner.socket_binding import _reason, bind


def test_a_bound_port_refuses_connections_until_it_listens():
    with bind("127.0.0.1", 0) as listener, socket.socket() as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(listener.getsockname())
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            pass


def test_a_port_somebody_listens_on_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartupError, match="is taken; choose another"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_an_unknown_host_is_named():
    with pytest.raises(StartupError, match='the host "no host" is unknown'):
        bind("no host", 0)


def test_a_name_and_the_other_family_can_be_bound():
    with bind("localhost", 0) as listener:
        assert listener.getsockname()[1] > 0
    if socket.has_ipv6:
        with bind("::1", 0) as listener:
            assert listener.family is socket.AF_INET6


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "may not be used by this user; choose a --port above 1023"),
        (errno.EADDRNOTAVAIL, "is no address of this machine; --host is usually 127.0.0.1"),
        (errno.ENOBUFS, f"{os.strerror(errno.ENOBUFS)}; choose another --port"),
    ],
)
def test_every_reason_has_its_remedy(number, words):
    assert _reason(OSError(number, os.strerror(number)), "127.0.0.1", 80).endswith(words)


async def test_a_port_that_is_taken_while_the_model_loads_is_told():
    with bind("127.0.0.1", 0) as ours, bind("127.0.0.1", ours.getsockname()[1]) as theirs:
        theirs.listen()
        server = web.AppRunner(web.Application())
        await server.setup()
        try:
            with pytest.raises(StartupError, match="was taken while the model was loading"):
                await _listen(server, ours)
        finally:
            await server.cleanup()
