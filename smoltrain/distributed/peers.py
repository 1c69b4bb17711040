"""Is every other rank still there? One connection from each rank to rank 0, over which nothing is sent in good times.

    a process that ends        closes its connection: rank 0 hears of it within milliseconds
    a host without power       answers no keep-alive of the kernel (man 7 tcp): after engine.lost_host_s it is lost
    a rank that must give up   says why before it leaves

Rank 0 tells all others, who leave too: a rank that waits for one that is gone would wait for ever, as no collective
here has a time limit. It is the kernel that answers for a host: no rank is ended for being slow, stopped or in native
code. What hangs while its host is well is the watchdog's business (engine.hang_s).
"""

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import asdict

from smoltrain.distributed.verdict import ENDED, UNHEARD, Verdict, find_speaker, judge_loss

COLLECT_S = 0.2  # between the first loss and the word to all: ranks of one host are lost together
SPEAK_S = 0.5  # for the main thread, which may have found the loss itself, to speak first
STUCK_S = 3.0  # that a main thread may wait for others who are gone
LEAVE_S = {"lost": 12.0, "failed": 120.0}  # for a main thread that closes what is open; longer if nothing is broken
CONNECT_TIMEOUT_S = 20.0
FLUSH_S = 0.2  # for the last word to get out before the process ends
WAITING_FILES = ("/torch/distributed/", "/smoltrain/distributed/meeting.py")


class PeerWatch:
    """This rank's end of the connections; rank 0 has those of all others."""

    def __init__(self, rank: int, machines: tuple[int, ...], hosts: tuple[str, ...], lost_host_s: float) -> None:
        self._rank = rank
        self._machines = machines
        self._hosts = hosts
        self._lost_host_s = lost_host_s
        self._token = secrets.token_hex(16)
        self._listener: socket.socket | None = None
        self._connections: dict[socket.socket, int] = {}  # to the rank at the other end
        self._unread: dict[socket.socket, bytes] = {}
        self._left: set[int] = set()  # ranks that have said that they leave
        self._lost: dict[int, str] = {}  # those that have not -> what became of them
        self._tell_at: float | None = None
        self._verdict: Verdict | None = None
        self._judged = threading.Event()
        self._taken = threading.Event()  # the main thread speaks and leaves by itself
        self._spoken: set[str] = set()
        self._lock = threading.RLock()  # a signal may come while it is held

    # ---- opening: rank 0 listens, then the others connect, then all start

    def listen(self, *, on_loopback: bool) -> str:
        """Rank 0: what the others need to know."""
        backlog = len(self._machines)
        if on_loopback:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._listener = socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)
        return json.dumps([self._listener.getsockname()[1], self._token])

    def connect(self, address: str, told: str) -> None:
        """Every other rank. Errors: OSError."""
        port, token = json.loads(told)
        connection = socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S)
        connection.settimeout(None)
        _keep_alive(connection, self._lost_host_s)
        _send(connection, [token, self._rank])
        self._connections[connection] = 0

    def start(self) -> None:
        """From here on a loss ends this process."""
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    # ---- what the main thread asks and says

    def explain(self, timeout_s: float) -> Verdict | None:
        """The main thread has lost a connection, and leaves: why, if that is known by then; it is said once."""
        self._taken.set()
        self._judged.wait(timeout_s)
        if self._verdict:
            self._speak(self._verdict)
        return self._verdict

    def leave(self, code: int, text: str = "") -> None:
        """The last word of this rank: it is not lost. With a `text` no other can go on either."""
        self._taken.set()
        with self._lock:
            if self._rank in self._left:
                return
            self._left.add(self._rank)
        if self._verdict:  # by which others leave, who count on this rank to say it
            self._speak(self._verdict)
        if self._rank == 0:
            verdict = Verdict(code, self._name(0, text), (0,), "failed") if text else None
            self._tell_others({"verdict": asdict(verdict) if verdict else None})
        else:
            self._tell_others({"leave": code, "text": text})
        time.sleep(FLUSH_S if text else 0.0)

    def has_said(self, text: str) -> bool:
        """Whether this process has printed this text of another rank."""
        return any(text in spoken for spoken in self._spoken)

    def is_alone_on_machine(self) -> bool:
        """Whether no other rank is on this one's machine."""
        return self._machines.count(self._machines[self._rank]) == 1

    # ---- the thread

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for watched in (*self._connections, *([self._listener] if self._listener else [])):
                selector.register(watched, selectors.EVENT_READ)
            while selector.get_map() or self._tell_at is not None:
                for key, _ in selector.select(COLLECT_S):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        self._read(key.fileobj, selector)  # pyright: ignore[reportArgumentType]
                if self._tell_at is not None and time.monotonic() >= self._tell_at:
                    self._tell_at = None
                    self._judge(judge_loss(self._lost, self._machines, self._hosts, self._lost_host_s))

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        _keep_alive(connection, self._lost_host_s)
        self._unread[connection] = b""
        selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        """What has come; or the end of the connection."""
        fate = ENDED
        try:
            data = connection.recv(65536)
        except ConnectionResetError:
            data = b""
        except OSError:  # ETIMEDOUT, EHOSTUNREACH
            data = b""
            fate = UNHEARD
        *lines, rest = (self._unread.get(connection, b"") + data).split(b"\n")
        self._unread[connection] = rest
        for line in lines:
            if not self._hear(connection, line):
                data = b""  # a stranger
        if data:
            return
        selector.unregister(connection)
        rank = self._connections.pop(connection, None)
        self._unread.pop(connection)
        connection.close()
        if rank is not None and rank not in self._left:
            self._lost[rank] = fate
            self._tell_at = self._tell_at or time.monotonic() + COLLECT_S

    def _hear(self, connection: socket.socket, line: bytes) -> bool:
        """What one line says; False if no rank can have sent it."""
        if self._rank == 0 and connection not in self._connections:
            rank = self._read_hello(line)
            if rank is None:
                return False
            self._connections[connection] = rank
            return True
        said = json.loads(line)
        rank = self._connections[connection]
        if rank == 0:
            if said["verdict"] is None:
                self._left.add(0)
            else:
                gone = tuple(said["verdict"].pop("gone"))
                self._left |= {0} & {*gone}
                self._judge(Verdict(gone=gone, **said["verdict"]))
        else:
            self._left.add(rank)
            if said["text"]:
                self._judge(Verdict(said["leave"], self._name(rank, said["text"]), (rank,), "failed"))
        return True

    def _read_hello(self, line: bytes) -> int | None:
        """The rank that says who it is, if it knows the token: anybody may connect."""
        try:
            token, rank = json.loads(line)
            is_ours = hmac.compare_digest(token, self._token)
        except (ValueError, TypeError):
            return None
        return rank if is_ours else None

    def name_rank(self, rank: int) -> str:
        """As in `rank 3 on node7`."""
        return f"rank {rank} on {self._hosts[rank]}"

    def _name(self, rank: int, text: str) -> str:
        return f"{self.name_rank(rank)}: {text}"

    def _judge(self, verdict: Verdict) -> None:
        """The first reason counts: all others hear of it, and this process ends when its main thread is stuck."""
        if self._verdict:
            return
        self._verdict = verdict
        is_leaving = self._rank in self._left
        if self._rank == 0 and not is_leaving:  # before the main thread hears of it, which may end the process
            self._tell_others({"verdict": asdict(verdict)})
        self._judged.set()
        if is_leaving:
            return
        threading.Thread(target=self._end_process, args=(verdict,), name="peers-end", daemon=True).start()

    def _tell_others(self, message: object) -> None:
        for connection in list(self._connections):
            _send(connection, message)

    def _end_process(self, verdict: Verdict) -> None:
        if not self._taken.wait(SPEAK_S):
            self._speak(verdict)
        began = time.monotonic()
        waits_since = began
        while time.monotonic() < began + LEAVE_S[verdict.kind]:
            time.sleep(SPEAK_S)
            if not _is_main_thread_waiting():
                waits_since = time.monotonic()
            if time.monotonic() - waits_since > STUCK_S:
                break
        self._speak(verdict)
        sys.stderr.flush()
        os._exit(verdict.code)

    def _speak(self, verdict: Verdict) -> None:
        """One rank of each machine says it: the lowest one that is there. The one that failed speaks for itself."""
        speaker = find_speaker(verdict, self._machines, self._machines[self._rank])
        with self._lock:
            if verdict.text in self._spoken or speaker != self._rank:
                return
            self._spoken.add(verdict.text)
        for line in verdict.text.splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)


def _keep_alive(connection: socket.socket, lost_host_s: float) -> None:
    """Let the kernel ask whether the other host is there; 0 s: never."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not lost_host_s or not hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux has it
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(lost_host_s / 3)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(lost_host_s / 9)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(lost_host_s * 1000))


def _send(connection: socket.socket, message: object) -> None:
    with contextlib.suppress(OSError):  # the reading end will tell
        connection.sendall(json.dumps(message).encode() + b"\n")


def _is_main_thread_waiting() -> bool:
    """Whether the innermost Python line of the main thread is one that waits for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and any(name in frame.f_code.co_filename for name in WAITING_FILES)


# ---- the one of this process

_watches: list[PeerWatch] = []


def open_peer_watch(watch: PeerWatch) -> None:
    """Let this process's way out know the watch."""
    _watches[:] = [watch]


def leave_peers(code: int, text: str = "") -> None:
    """As PeerWatch.leave, where this process has a watch."""
    for watch in _watches:
        watch.leave(code, text)


def find_peer_watch() -> PeerWatch | None:
    """The watch of this process, if other ranks are there at all."""
    return _watches[0] if _watches else None
