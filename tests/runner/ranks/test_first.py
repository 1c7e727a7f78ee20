"""The other ranks as the first one has them, played by threads that speak over real sockets."""

import contextlib
import threading
import time

import pytest

from models.checkpoint import open_checkpoint
from models.errors import ExecutionError, ShareError
from models.executors import orders
from models.weights.matching import model_of, tensors_of
from models.weights.shares import plans_of
from runner.config import DialectName, RunnerConfig
from runner.engine.load import LoadOptions, ModelLoader
from runner.errors import LoadError, StartupError
from runner.ranks import first
from runner.ranks.first import Ranks
from runner.ranks.hostfile import Host
from runner.ranks.rank import versions
from runner.ranks.wire import connect

HERE = (Host("127.0.0.1", ("127.0.0.1",)), Host("b", ("127.0.0.1",)))
HELLO = {"versions": versions(), "ports": [1], "device": "cpu", "free": 1 << 30}


@pytest.fixture
def ranks():
    made = Ranks(HERE, None, None)
    yield made
    made.stop()


class Played:
    """Rank 1, which says what it is told to and answers each question with `answer`."""

    def __init__(self, ranks, hello=HELLO, answer=None):
        address = ranks.listen()
        self.orders = connect(address, ranks.secret, 1, "orders", 5)
        self.watch = connect(address, ranks.secret, 1, "watch", 5)
        self.watch.say(hello)
        self.answer = answer or {"done": 0, "free": 1 << 30}
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self):
        with contextlib.suppress(OSError, ValueError):
            while self.watch.hear() is not None:
                self.watch.say(self.answer)

    def close(self):
        self.orders.close()
        self.watch.close()


def fault_of(ranks):
    """Wait for it."""
    told = threading.Event()
    ranks.on_fault(lambda _: told.set())
    assert told.wait(60)
    return ranks.fault


def test_orders_arrive_as_they_were_given(ranks):
    played = Played(ranks)
    ranks.connected()
    ranks.tell(orders.Copy(1, 2, 3, 4, 5))
    assert orders.from_json(played.orders.hear(60)) == orders.Copy(1, 2, 3, 4, 5)
    played.close()


def test_a_rank_that_goes_is_a_fault_that_names_its_host(ranks):
    played = Played(ranks)
    ranks.connected()
    played.close()
    assert fault_of(ranks) == ("rank 1 on b is gone: its connection was closed; look at b, then load the model again")
    with pytest.raises(ExecutionError, match="rank 1 on b"):
        ranks.tell(orders.GiveBack())


def test_a_rank_that_answers_and_does_nothing_is_a_fault(ranks, monkeypatch):
    monkeypatch.setattr(first, "STALL_S", 0.2)
    monkeypatch.setattr(first, "ASK_S", 0.05)
    played = Played(ranks)
    ranks.connected()
    ranks.tell(orders.GiveBack())
    assert "has not finished a step for 0.2 s; check b" in fault_of(ranks)
    played.close()


def test_a_rank_that_is_idle_is_none(ranks, monkeypatch):
    monkeypatch.setattr(first, "STALL_S", 0.0)
    monkeypatch.setattr(first, "ASK_S", 0.01)
    played = Played(ranks)
    ranks.connected()
    answered = time.monotonic()
    while ranks._others[0].heard < answered:
        threading.Event().wait(0.01)
    ranks.check()
    played.close()


def test_what_a_rank_could_not_do_is_told_with_its_host(ranks):
    played = Played(ranks)
    ranks.connected()
    played.watch.say({"failed": "no such model"})
    assert fault_of(ranks) == "rank 1 on b: no such model"
    with pytest.raises(LoadError, match="no such model"):
        ranks.loaded()
    played.close()


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (HELLO | {"versions": {"mlx": "0"}}, "install the same versions on all hosts"),
        (HELLO | {"device": "metal"}, "computes on metal, and this machine on cpu; ranks must be of one kind"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks, hello, reason):
    played = Played(ranks, hello)
    with pytest.raises(LoadError, match=reason):
        ranks.connected()
    played.close()


def test_a_rank_that_does_not_come_is_named(ranks, monkeypatch):
    monkeypatch.setattr(first, "START_S", 0.1)
    ranks.listen()
    with pytest.raises(LoadError, match=r"rank 1 on b did not come within 0\.1 s; check that `ssh b` works"):
        ranks.connected()


def test_the_least_room_counts(ranks):
    played = Played(ranks, HELLO | {"free": 7})
    ranks.connected()
    assert ranks.free_bytes(100) == 7
    played.close()


def test_who_does_not_know_the_secret_is_turned_away(ranks):
    address = ranks.listen()
    with pytest.raises(OSError, match="does not know the secret"):
        connect(address, "another", 1, "orders", 5)


def test_the_first_host_has_to_be_this_machine():
    away = Ranks((Host("127.0.0.1", ("192.0.2.1",)), HERE[1]), None, None)
    with pytest.raises(StartupError, match=r"first host is this machine, and it has no address 192\.0\.2\.1"):
        away.listen()


def test_heads_that_do_not_divide_are_refused_with_numbers_that_do(parity):
    checkpoint = open_checkpoint(str(parity / "smollm2"), parity)
    model = model_of(checkpoint)
    with pytest.raises(ShareError) as caught:
        plans_of(model, tensors_of(model, checkpoint), "smollm2", 2, "tensor")
    assert str(caught.value) == (
        "smollm2 cannot be shared by 2 ranks: 9 attention heads do not divide; 3 or 9 ranks can, --shard=pipeline "
        "shares it by layers"
    )


def test_what_makes_embeddings_or_pictures_is_not_shared(ranks, tiny_bert, tiny_pipeline, tmp_path):
    config = RunnerConfig(DialectName.CLASSIC, None, 0, tmp_path)
    loader = ModelLoader(config, ranks)
    for model in (tiny_bert, tiny_pipeline):
        with pytest.raises(LoadError, match="leave --hostfile out"):
            loader.plan(str(model), LoadOptions(1, None, None))
