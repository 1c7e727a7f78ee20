"""The other ranks, as the first one has them: started, joined, told, asked whether they are alive, and ended.

A fault is found by whichever comes first: a process or a connection ends (at once), a rank does not answer for
SILENCE_S, or answers and has not done for STALL_S what it was told. Then `fault` says what is to be done, and nothing
works any more: the ranks that are left wait for one that does not come.
"""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.device import device
from models.errors import ExecutionError
from models.executors.orders import Order, to_json
from runner.errors import LoadError, StartupError
from runner.ranks.hostfile import Host, Hostfile
from runner.ranks.joining import environments, free_ports, join
from runner.ranks.rank import versions
from runner.ranks.starting import END_S, RankProcess
from runner.ranks.wire import Line, accept

if TYPE_CHECKING:
    import mlx.core as mx

START_S = 60.0
"""What starting a rank may take, ssh and Python's imports."""
ASK_S = 1.0
SILENCE_S = 10.0
STALL_S = 60.0
LAST_WORDS_S = 0.1
"""How long a process whose connection has ended is waited for, so that its exit code and last line are told."""
EXPLAIN_S = 2.0
"""How long a failed step waits for the fault that explains it."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Other:
    """Another rank."""

    host: Host
    rank: int
    process: RankProcess | None = None
    orders: Line | None = None
    watch: Line | None = None
    hello: Mapping[str, Any] = field(default_factory=dict)
    heard: float = 0.0
    done: int = 0
    told: int = 0
    moved: float = 0.0
    """When it last was not behind, or did something."""
    free: int = 0
    loaded: bool = False


class Ranks:
    """Implements `Others`. Thread: any, but for `join`, which is the executor's."""

    def __init__(self, hosts: Sequence[Host], hostfile: Hostfile | None, group: "mx.distributed.Group | None") -> None:
        """`hostfile`: start them; None: they run, and are the `group`."""
        self._hosts = tuple(hosts)
        self._hostfile = hostfile
        self._group = group
        self._secret = secrets.token_hex(16)
        self._others = [_Other(host, rank) for rank, host in enumerate(hosts) if rank]
        self._listener: socket.socket | None = None
        self._changed = threading.Condition()
        self._fault: str | None = None
        self._callbacks: list[Callable[[str], None]] = []
        self._stopping = threading.Event()

    @property
    def count(self) -> int:
        """How many ranks there are, the first one among them."""
        return len(self._hosts)

    @property
    def fault(self) -> str | None:
        """What happened, naming the host, and what to do about it; None: nothing."""
        return self._fault

    @property
    def secret(self) -> str:
        """What shows that somebody is one of the ranks."""
        return self._secret

    def on_fault(self, callback: Callable[[str], None]) -> None:
        """Call it when there is a fault, in any thread."""
        with self._changed:
            self._callbacks.append(callback)
            fault = self._fault
        if fault is not None:
            callback(fault)

    def listen(self) -> tuple[str, int]:
        """Listen for the other ranks where the hostfile says; where that is.

        Raises:
            StartupError: the address is not this machine's.
        """
        ip = self._hosts[0].ips[0]
        try:
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            self._listener = socket.create_server((ip, 0), family=family)
        except OSError as error:
            raise StartupError(
                f"the hostfile's first host is this machine, and it has no address {ip}: {error.strerror}"
            ) from error
        threading.Thread(target=self._accept, name="ranks", daemon=True).start()
        threading.Thread(target=self._look_after, name="ranks", daemon=True).start()
        port: int = self._listener.getsockname()[1]
        return ip, port

    def start(self) -> None:
        """Listen, and start the other ranks.

        Raises:
            StartupError: one cannot be started at all.
        """
        assert self._hostfile is not None
        address = self.listen()
        for other in self._others:
            invitation = {
                "rank": other.rank,
                "ranks": self.count,
                "ips": other.host.ips,
                "address": address,
                "secret": self._secret,
                "environment": dict(self._hostfile.environment),
            }
            try:
                other.process = RankProcess(other.host, other.rank, invitation, self._hostfile.environment)
            except OSError as error:
                self.stop()
                raise StartupError(f"rank {other.rank} on {other.host.name} cannot be started: {error}") from error
        logger.info("ranks started", extra={"fields": {"ranks": self.count, "address": f"{address[0]}:{address[1]}"}})

    def connected(self) -> None:
        """Wait until all ranks are there, and see whether they fit each other. Idempotent.

        Raises:
            LoadError: one does not come, or is of another version or kind.
        """
        limit = time.monotonic() + START_S
        with self._changed:
            while missing := [other for other in self._others if not other.hello or other.orders is None]:
                self._check()
                if (left := limit - time.monotonic()) <= 0:
                    first = missing[0]
                    raise LoadError(
                        f"rank {first.rank} on {first.host.name} did not come within {START_S:g} s; check that "
                        f"`ssh {first.host.name}` works without a password and that it reaches {self._hosts[0].ips[0]}"
                    )
                self._changed.wait(left)
            self._check()
        own, kind = versions(), device().kind
        for other in self._others:
            if other.hello["versions"] != own:
                raise LoadError(
                    f"rank {other.rank} on {other.host.name} has {_listed(other.hello['versions'])}, and this machine "
                    f"{_listed(own)}; install the same versions on all hosts"
                )
            if other.hello["device"] != kind:
                raise LoadError(
                    f"rank {other.rank} on {other.host.name} computes on {other.hello['device']}, and this machine on "
                    f"{kind}; ranks must be of one kind"
                )

    def group(self) -> "mx.distributed.Group":
        """MLX's group of all ranks, joined the first time that it is asked for. Thread: the executor's.

        Raises:
            LoadError: MLX could not.
        """
        if self._group is None:
            assert self._hostfile is not None
            try:
                ports = [free_ports(self._hosts[0].ips), *(other.hello["ports"] for other in self._others)]
            except OSError as error:
                raise LoadError(
                    f"the hostfile's first host is this machine, and it lacks one of the addresses "
                    f"{', '.join(self._hosts[0].ips)}: {error.strerror}"
                ) from error
            own, *theirs = environments(self._hostfile, ports)
            names = ", ".join(host.name for host in self._hosts)
            for other, environment in zip(self._others, theirs, strict=True):
                message = {"join": environment, "backend": self._hostfile.backend, "others": names}
                self._say(other, message)
            try:
                self._group = join(own, self._hostfile.backend, names)
            except RuntimeError as error:
                raise LoadError(f"MLX could not connect the ranks on {names}: {error}") from error
        return self._group

    def free_bytes(self, own: int) -> int:
        """What each rank may still take, of the one that may take least; ranks on one machine share what it has."""
        here = [own // self._beside(self._hosts[0])]
        return min(here + [other.free // self._beside(other.host) for other in self._others])

    def load(self, load: Mapping[str, object]) -> None:
        """Have all others load their part. Raises LoadError."""
        for other in self._others:
            other.loaded = False
            self._say(other, {"load": load})

    def loaded(self) -> None:
        """Wait until they have. Raises LoadError: one could not."""
        with self._changed:
            while not all(other.loaded for other in self._others):
                self._check()
                self._changed.wait(ASK_S)
            self._check()

    def check(self) -> None:
        """Raise LoadError if there is a fault."""
        with self._changed:
            self._check()

    def tell(self, order: Order) -> None:
        """See `Others.tell`."""
        message = to_json(order)
        if self._fault is not None:
            raise ExecutionError(self._fault)
        now = time.monotonic()
        for other in self._others:
            if other.told == other.done:
                other.moved = now
            other.told += 1
            assert other.orders is not None
            try:
                other.orders.say(message)
            except OSError as error:
                raise self.explain(error) from error

    def explain(self, error: Exception) -> ExecutionError:
        """See `Others.explain`."""
        with self._changed:
            self._changed.wait_for(lambda: self._fault is not None, EXPLAIN_S)
        self._fail(f"the first rank failed ({error}), and the others wait for it; load the model again")
        return ExecutionError(self._fault or str(error))

    def stop(self) -> None:
        """End the other ranks, and wait for it a little. Idempotent."""
        self._stopping.set()
        for other in self._others:
            for line in (other.orders, other.watch):
                if line is not None:
                    line.close()
            if other.process is not None:
                other.process.close()
        until = time.monotonic() + END_S
        for other in self._others:
            if other.process is not None:
                other.process.wait(until)
        if self._listener is not None:
            self._listener.close()

    def _beside(self, host: Host) -> int:
        return sum(each.name == host.name or (each.is_here and host.is_here) for each in self._hosts)

    def _say(self, other: _Other, message: object) -> None:
        assert other.orders is not None
        try:
            other.orders.say(message)
        except OSError as error:
            raise LoadError(str(self.explain(error))) from error

    def _check(self) -> None:
        if self._fault is not None:
            raise LoadError(self._fault)

    def _fail(self, fault: str) -> None:
        """The first fault counts; what follows from it does not."""
        with self._changed:
            if self._fault is not None or self._stopping.is_set():
                return
            self._fault = fault
            self._changed.notify_all()
            callbacks = list(self._callbacks)
        logger.error("a rank is lost", extra={"fields": {"reason": fault}})
        for callback in callbacks:
            callback(fault)

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        """Find out who connects; of a rank's watch this thread becomes the reader."""
        known = accept(connection, self._secret)
        if known is None:
            return
        rank, purpose, line = known
        other = next((each for each in self._others if each.rank == rank), None)
        if other is None or getattr(other, purpose, line) is not None:
            line.close()
            return
        with self._changed:
            setattr(other, purpose, line)
            self._changed.notify_all()
        if purpose == "watch":
            self._listen_to(other, line)

    def _listen_to(self, other: _Other, line: Line) -> None:
        """Hear what a rank says of itself until it ends."""
        other.heard = time.monotonic()
        try:
            while (message := line.hear()) is not None:
                self._heard(other, message)
        except (OSError, ValueError):
            pass
        self._lost(other)

    def _heard(self, other: _Other, message: object) -> None:
        now = other.heard = time.monotonic()
        match message:
            case {"failed": str(reason)}:
                self._fail(f"rank {other.rank} on {other.host.name}: {reason}")
            case {"loaded": True}:
                with self._changed:
                    other.loaded = True
                    self._changed.notify_all()
            case {"done": int(done), "free": int(free)}:
                if done != other.done:
                    other.done, other.moved = done, now
                other.free = free
            case {"versions": dict(known), "ports": list(ports), "device": str(kind), "free": int(free)}:
                with self._changed:
                    other.hello, other.free = {"versions": known, "ports": ports, "device": kind}, free
                    self._changed.notify_all()
            case _:
                self._fail(f"rank {other.rank} on {other.host.name} said what is not understood; check its version")

    def _lost(self, other: _Other) -> None:
        """A connection or a process has ended."""
        process = other.process
        # A process that is on its way has words for it.
        if process is not None and (code := process.ended(within_s=LAST_WORDS_S)) is not None:
            what = f"ended with exit code {code} ({process.last_words()})"
        else:
            what = "is gone: its connection was closed"
        remedy = (
            f"look at {other.host.name}, then load the model again"
            if other.hello
            else f"check that `ssh {other.host.name}` works without a password and that {other.host.python} there has "
            "this package"
        )
        if other.host.is_here and not other.hello:
            remedy = f"check that {other.host.python} has this package"
        self._fail(f"rank {other.rank} on {other.host.name} {what}; {remedy}")

    def _look_after(self) -> None:
        """Ask every rank every ASK_S whether it is alive, and see whether it is."""
        while self._fault is None:
            now = time.monotonic()
            for other in self._others:
                self._look_at(other, now)
            if self._stopping.wait(ASK_S):
                return

    def _look_at(self, other: _Other, now: float) -> None:
        if other.watch is None:
            if other.process is not None and other.process.ended() is not None:
                self._lost(other)
            return
        name = f"rank {other.rank} on {other.host.name}"
        try:
            other.watch.say({"alive": True})
        except OSError:
            self._lost(other)
            return
        if now - other.heard > SILENCE_S and other.heard:
            self._fail(
                f"{name} has not answered for {SILENCE_S:g} s; check that the machine is awake and its network works, "
                "then load the model again"
            )
        elif other.told > other.done and now - other.moved > STALL_S:
            self._fail(f"{name} has not finished a step for {STALL_S:g} s; check {other.host.name}, then load again")


def _listed(of: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in of.items())
