"""A server on loopback that takes uploads as the Hugging Face Hub does, and keeps every byte.

Spoken to through HF_ENDPOINT by the real client (huggingface_hub, with HF_HUB_DISABLE_XET=1): whoami, create, the
check of the model card, preupload, the LFS batch, the upload of each LFS object, its verification, and the commit.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, USER = "hf_right", "me"


@dataclass
class Hub:
    """What was received. The organisation `closed` may not be written to."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)  # OWNER/NAME -> path -> content
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # of the commits
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS: SHA-256 -> content
    requests: list[str] = field(default_factory=list)
    fails_on: str = ""  # part of a path that is answered with 403


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is set by `serve`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._handle(b"")

    def do_PUT(self) -> None:
        self._handle(self._body())

    def do_POST(self) -> None:
        self._handle(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if "error" in body:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        self.wfile.write(data)

    def _handle(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("/objects/"):  # as at S3, where the signed URL is the permission
            oid = path.rpartition("/")[2]
            right = hashlib.sha256(body).hexdigest() == oid
            self.hub.objects |= {oid: body} if right else {}
            return self._answer(200 if right else 400, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.hub.fails_on and self.hub.fails_on in path:
            return self._answer(403, {"error": "You don't have the rights to write here"})
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": USER})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            return self._preupload(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if path == "/verify":
            known = json.loads(body)["oid"] in self.hub.objects
            return self._answer(200 if known else 404, {})
        if path.endswith("/commit/main"):
            return self._commit(path.split("/api/models/")[1].removesuffix("/commit/main"), body)
        return self._answer(404, {"error": f"no such address: {path}"})

    def _create(self, asked: dict[str, Any]) -> None:
        if asked.get("organization") == "closed":
            return self._answer(403, {"error": 'You don\'t have the rights to create a model under "closed"'})
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            self.hub.repos[name] = {}
            self.hub.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
        error = {"error": "You already created this model repo"} if status == 409 else {}
        return self._answer(status, {"url": f"{self.hub.url}/{name}", "name": name} | error)

    def _preupload(self, asked: dict[str, Any]) -> None:
        large = (".safetensors", "tokenizer.json")
        modes = [(f["path"], "lfs" if f["path"].endswith(large) else "regular") for f in asked["files"]]
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in modes]
        return self._answer(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            if one["oid"] not in self.hub.objects:
                upload, verify = {"href": f"{self.hub.url}/objects/{one['oid']}"}, {"href": f"{self.hub.url}/verify"}
                one |= {"actions": {"upload": upload, "verify": verify}}
            objects.append(one)
        return self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.objects[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        return self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})


def serve() -> tuple[Hub, ThreadingHTTPServer]:
    """A running server on a free port of loopback; end it with shutdown() and server_close()."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return hub, server
