"""Both ends of a line between ranks show that they know the secret, each by itself."""

import json
import socket
import threading

import pytest

from runner.ranks.wire import Line, accept, connect

SECRET = "of these ranks"


@pytest.fixture
def greeted():
    """A server for one who connects: its address, and what `accept` makes of them."""
    server = socket.create_server(("127.0.0.1", 0))
    found = []

    def greet():
        connection, _ = server.accept()
        found.append(accept(connection, SECRET))

    thread = threading.Thread(target=greet)
    thread.start()

    def outcome():
        thread.join(10)
        return found[0]

    yield server.getsockname(), outcome
    server.close()


def test_who_knows_the_secret_is_let_in_with_rank_and_purpose(greeted):
    address, outcome = greeted
    line = connect(address, SECRET, 3, "watch", 5)
    rank, purpose, own = outcome()
    assert (rank, purpose) == (3, "watch")
    own.say({"alive": True})
    assert line.hear(5) == {"alive": True}
    line.close()
    own.close()


@pytest.mark.parametrize(
    "answer",
    [
        {"rank": 1, "purpose": "orders", "proof": "0" * 64, "nonce": "n"},
        {"rank": 1, "purpose": "orders", "proof": "", "nonce": "n"},
        {"rank": "1", "purpose": "orders", "proof": "0" * 64, "nonce": "n"},
        ["no object"],
        None,
    ],
)
def test_whoever_answers_the_challenge_wrongly_is_let_go_and_told_nothing(greeted, answer):
    address, outcome = greeted
    with socket.create_connection(address, 5) as connection:
        reader = connection.makefile("rb")
        assert json.loads(reader.readline())
        connection.sendall(json.dumps(answer).encode() + b"\n")
        assert reader.read() == b""
    assert outcome() is None


def test_a_rank_does_not_follow_whoever_does_not_know_the_secret():
    server = socket.create_server(("127.0.0.1", 0))

    def pretend():
        connection, _ = server.accept()
        line = Line(connection)
        line.say("a challenge")
        line.hear(5)
        line.say("0" * 64)
        line.close()

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(ConnectionRefusedError, match="does not know the secret"):
        connect(server.getsockname(), SECRET, 1, "orders", 5)
    thread.join(10)
    server.close()
