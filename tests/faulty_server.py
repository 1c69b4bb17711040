"""A file server on loopback that fails at random, but always in the same way for the same seed and requests."""

import hashlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


@dataclass
class FaultyServer:
    """`with FaultyServer({"a.txt": b"..."}, {"unavailable": 0.1}) as server`: serves `server.url("a.txt")`.

    Faults, each with the probability that a request meets it: `unavailable` (503), `stall` (no answer), `cut` (the
    connection closes within the body), `short` (half of the body, said to be all), `garbled` (all of it), `reset` (of
    the connection). `files` and `faults` may be changed at any time: `del server.files["a.txt"]`.
    """

    files: dict[str, bytes]
    faults: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    status: int = 503  # of `unavailable`
    ranges: bool = True  # whether it gives parts of a file
    etags: bool = True
    content_type: str | None = None  # that it says of every file
    met: Counter[str] = field(default_factory=Counter)
    asked: list[str] = field(default_factory=list)  # METHOD NAME BYTES

    def __enter__(self) -> Self:
        self._random, self._lock, self.released = random.Random(self.seed), threading.Lock(), threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"faulty": self}))
        self.closed = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True  # for connections that are still open
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, name: str) -> str:
        """Where the file of that name is."""
        return f"http://127.0.0.1:{self._server.server_port}/{name}"

    def draw(self, method: str) -> str:
        """The fault that the next request meets, or ''. A HEAD has no body that could be wrong."""
        with self._lock:
            at = self._random.random()
        for fault, probability in self.faults.items():
            if at < probability and (method == "GET" or fault not in ("cut", "short", "garbled")):
                self.met[fault] += 1
                return fault
            at -= probability
        return ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away, or a connection that was reset on purpose


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer takes 40 ms

    def do_GET(self) -> None:
        faulty, name, asked = self.faulty, self.path.partition("?")[0].strip("/"), self.headers.get("Range", "")
        faulty.asked.append(f"{self.command} {name} {asked}".strip())
        raw, fault = faulty.files.get(name), "reset" if faulty.closed else faulty.draw(self.command)
        if fault == "stall":
            faulty.released.wait(60)
        if fault in ("stall", "reset"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            raise ConnectionResetError
        if fault == "unavailable":
            self._answer(faulty.status, b"", {})
        elif raw is None:
            self._answer(404, b"", {})
        else:
            self._file(raw, asked, fault)

    do_HEAD = do_GET

    def _file(self, raw: bytes, asked: str, fault: str) -> None:
        headers = {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"'} if self.faulty.etags else {}
        if self.faulty.content_type is not None:
            headers["Content-Type"] = self.faulty.content_type
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked) if self.faulty.ranges else None
        if found is None:
            self._answer(200, raw, headers, fault)
        elif (first := int(found[1])) >= len(raw):
            self._answer(416, b"", {})
        else:
            last = min(int(found[2]), len(raw) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(raw)}"
            self._answer(206, raw[first : last + 1], headers, fault)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], fault: str = "") -> None:
        half = len(body) // 2
        if fault == "short":
            body = body[:half]
        if fault == "garbled":
            body = bytes(byte ^ 0xFF for byte in body)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:half] if fault == "cut" else body)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass
