"""A small Hugging Face Hub on loopback: what huggingface_hub and datasets ask of the real one in order to read."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repository of one commit. With a token it is gated: only who sends that one gets its files."""

    name: str
    files: dict[str, bytes]
    kind: str = "models"  # or datasets
    token: str | None = None

    @property
    def sha(self) -> str:
        """The commit: a function of what is in it."""
        digests = [name.encode() + hashlib.sha1(raw).digest() for name, raw in sorted(self.files.items())]
        return hashlib.sha1(b"".join(digests)).hexdigest()


@dataclass
class Hub:
    """`with Hub([...]) as hub`: serves on `hub.url`, and keeps what it was asked for in `hub.asked`."""

    repos: list[Repo]
    asked: list[str] = field(default_factory=list)
    is_silent: bool = False  # from when it was asked to be: it accepts, and never answers

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def find(self, kind: str, name: str) -> Repo | None:
        """The repository of that kind and name."""
        return next((repo for repo in self.repos if (repo.kind, repo.name) == (kind, name)), None)


class _Handler(BaseHTTPRequestHandler):
    """Routes are those of huggingface.co; errors carry its X-Error-Code, by which the client knows them."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.hub.is_silent:
            threading.Event().wait()
        if path == "/fall-silent":
            self.hub.is_silent = True
            self._json({})
            return
        self.hub.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            kind, name, rest = found.groups()
            self._with_repo(kind, name, lambda repo: self._api(repo, rest or "", body), files=rest == "auth-check")
        elif found := re.fullmatch(r"(/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            dataset, name, revision, file = found.groups()
            kind = "datasets" if dataset else "models"
            self._with_repo(kind, name, lambda repo: self._file(repo, revision, file), files=True)
        else:
            self._fail(404, "", f"no route {path}")

    do_HEAD = do_POST = do_GET

    def _with_repo(self, kind: str, name: str, answer: Any, *, files: bool) -> None:
        """Like the real one, tell those without a token that a missing repository is none of their business."""
        repo, token = self.hub.find(kind, name), self.headers.get("Authorization")
        if repo is None:
            self._fail(404 if token else 401, "RepoNotFound", "Repository not found")
        elif files and repo.token and token != f"Bearer {repo.token}":
            self._fail(403 if token else 401, "GatedRepo", f"Access to {name} is restricted")
        else:
            answer(repo)

    def _api(self, repo: Repo, rest: str, body: bytes) -> None:
        """Folders lie no deeper than one level here, so that listing one is listing all that is below it."""
        what, _, path = rest.partition("/")
        entries = [_entry(name, raw) for name, raw in repo.files.items()]
        revision, _, folder = path.partition("/")
        if what in ("revision", "tree", "paths-info") and revision not in ("main", repo.sha):
            self._fail(404, "RevisionNotFound", f"no revision {revision}")
        elif what in ("", "revision"):
            siblings = [{"rfilename": name} for name in repo.files]
            self._json({"id": repo.name, "sha": repo.sha, "siblings": siblings, "private": False, "tags": []})
        elif what == "auth-check":
            self._json({})
        elif what == "tree":
            folders = {name.rpartition("/")[0] for name in repo.files} - {""}
            entries += [{"type": "directory", "path": name, "oid": repo.sha, "size": 0} for name in sorted(folders)]
            self._json([entry for entry in entries if entry["path"].rpartition("/")[0] == folder])
        elif what == "paths-info":
            paths = json.loads(body)["paths"]
            self._json([entry for entry in entries if entry["path"] in paths])
        else:
            self._fail(404, "", f"no route {rest}")

    def _file(self, repo: Repo, revision: str, file: str) -> None:
        if revision not in ("main", repo.sha):
            self._fail(404, "RevisionNotFound", f"no revision {revision}")
        elif file not in repo.files:
            self._fail(404, "EntryNotFound", f"no file {file}", {"X-Repo-Commit": repo.sha})
        else:
            raw = repo.files[file]
            headers = {
                "X-Repo-Commit": repo.sha,
                "ETag": f'"{hashlib.sha1(raw).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(found[1]), min(int(found[2] or len(raw) - 1), len(raw) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(raw)}"
                self._send(206, raw[first : last + 1], headers)
            else:
                self._send(200, raw, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(more or {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _entry(name: str, raw: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
