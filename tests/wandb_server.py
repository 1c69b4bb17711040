"""A W&B server on the loopback: as much of its protocol as the client needs, what it was told, and faults on demand.

    with WandbServer() as server:
        ...  # train with **server.environment()
        server.fail("hang")  # from now on; or server.fail("error", after_step=6)
        assert server.runs["ID"].steps[7]["train/lr"] == 0.1

GraphQL, file_stream and uploads of artifacts, for the wandb client of 0.31: Go's wandb-core and its Python part.
"""

import gzip
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["", "error", "hang", "nonsense", "unauthorized"]
KEY = "k" * 40
HANG_S = 300.0  # longer than anybody waits
ENTITY = {"id": "e", "name": "me"}
QUICK = {  # the client's own patience, for tests; it sends whole seconds apart
    "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
    "WANDB__FILE_STREAM_RETRY_MAX": "1",
    "WANDB__FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "0.1",
    "WANDB__FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "0.2",
    "WANDB__GRAPHQL_RETRY_MAX": "1",
    "WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "0.1",
    "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "0.2",
    "WANDB__FILE_TRANSFER_RETRY_MAX": "1",
    "WANDB__DISABLE_STATS": "true",
    "WANDB__DISABLE_META": "true",
    "WANDB__SAVE_REQUIREMENTS": "false",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_ERROR_REPORTING": "false",
}


@dataclass
class Run:
    """What the server was told of one run."""

    fields: dict[str, Any] = field(default_factory=dict)  # of upsertBucket: displayName, project, entity, tags, ...
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)  # of the history, by offset, as they came
    artifacts: list[dict[str, Any]] = field(default_factory=list)  # the inputs of createArtifact
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines in order."""
        return [json.loads(self.lines[offset]) for offset in sorted(self.lines)]

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """Everything at each step."""
        steps: dict[int, dict[str, Any]] = {}
        for line in self.history:
            steps.setdefault(line["_step"], {}).update(line)
        return steps


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class WandbServer:
    """Runs by id, in memory; it answers until it is told to fail."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.asked: list[str] = []  # operations and paths, in order
        self._fault: Fault = ""
        self._after: tuple[Fault, int] | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def handle_any(self) -> None:
                server.handle(self)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What a process needs to log here, with little patience."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, **QUICK}

    def fail(self, fault: Fault, after_step: int | None = None) -> None:
        """From now on, or once the history of any run has reached a step."""
        if after_step is None:
            self._fault = fault
        else:
            self._after = fault, after_step

    def wait_for_step(self, run_id: str, step: int, patience_s: float = 20) -> None:
        """Until the history of a run has a step. Errors: TimeoutError."""
        deadline = time.monotonic() + patience_s
        while step not in (self.runs[run_id].steps if run_id in self.runs else {}):
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} did not come: {self.asked}")
            time.sleep(0.02)

    def close(self) -> None:
        """The port is closed: connections are refused."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> "WandbServer":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._closing.is_set():
            self.close()

    # ---- what is asked

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request, or fail as told."""
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        if request.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        match self._fault:
            case "hang":
                self._closing.wait(HANG_S)
                request.close_connection = True
            case "error":
                _reply(request, 500, b'{"error": "out of order"}')
            case "unauthorized":
                _reply(request, 401, b'{"error": "unauthorized"}')
            case "nonsense":
                _reply(request, 200, b"<html>it works!</html>")
            case _:
                with self._lock:
                    answer = self._answer(request.path, body)
                _reply(request, 200, json.dumps(answer).encode())

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/graphql"):
            query = json.loads(body)
            return {"data": self._graphql(query["query"], query.get("variables") or {})}
        self.asked.append(path)
        if stream := re.match(r".*/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self._stream(stream[1], json.loads(body))
        return {}

    def _stream(self, run_id: str, told: dict[str, Any]) -> None:
        run = self.runs.setdefault(run_id, Run())
        history = (told.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for i, line in enumerate(history["content"]):
            run.lines[history["offset"] + i] = line
        if "exitcode" in told:
            run.exit_code = told["exitcode"]
        if self._after and max(run.steps, default=-1) >= self._after[1]:
            self._fault, self._after = self._after[0], None

    def _graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        self.asked.append(name[1] if name else query)
        match name[1] if name else "":
            case "UpsertBucket":
                return self._upsert(given)
            case "RunResumeStatus":
                return {"model": {"id": "p", "name": given["project"], "entity": ENTITY, "bucket": self._bucket(given)}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                return self._create_artifact(given["input"])
            case "CreateArtifactFiles":
                return {"createArtifactFiles": {"files": {"edges": [self._file(f) for f in _specs(given)]}}}
            case "CreateArtifactManifest" | "UpdateArtifactManifest" as what:
                file = {"id": "f", "uploadUrl": f"{self.url}/upload/manifest", "uploadHeaders": []}
                return {what[0].lower() + what[1:]: {"artifactManifest": {"id": "m", "file": file}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "ArtifactType":
                return {"project": None}
        if "viewer" in query:
            viewer = {"id": "u", "entity": "me", "username": "me", "email": "me@localhost", "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        return {}

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        run_id = given.get("name") or given["id"]
        new = run_id not in self.runs
        run = self.runs.setdefault(run_id, Run())
        new_fields = {key: value for key, value in given.items() if value is not None}
        run.fields = new_fields | run.fields  # later ones repeat what the first answer said
        run.config |= {k: v.get("value") for k, v in json.loads(given.get("config") or "{}").items()}
        entity = {"id": "e", "name": run.fields.get("entity", ENTITY["name"])}
        project = {"id": "p", "name": run.fields.get("project", ""), "entity": entity}
        bucket = {"id": run_id, "name": run_id, "displayName": run.fields.get("displayName") or run_id}
        rest = {"description": "", "config": "{}", "sweepName": None, "historyLineCount": len(run.lines)}
        return {"upsertBucket": {"bucket": bucket | rest | {"project": project}, "inserted": new}}

    def _bucket(self, given: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(given["name"])
        if run is None:
            return None
        tail = [run.lines[offset] for offset in sorted(run.lines)[-1:]]
        counts = {"historyLineCount": len(run.lines), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": json.dumps(tail), "eventsTail": "[]", "config": "{}"}
        texts["summaryMetrics"] = tail[0] if tail else "{}"
        rest = {"tags": [], "notes": "", "wandbConfig": '{"t": 1}'}
        return {"id": given["name"], "name": given["name"], "displayName": given["name"], **counts, **texts, **rest}

    def _create_artifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        if run := self.runs.get(asked.get("runName") or ""):
            run.artifacts.append(asked)
        artifact = {"id": "a", "digest": asked["digest"], "state": "PENDING", "aliases": []}
        sequence = {"id": "s", "name": "", "latestArtifact": None}
        return {"createArtifact": {"artifact": artifact | {"artifactSequence": sequence}}}

    def _file(self, spec: dict[str, Any]) -> dict[str, Any]:
        where = {"storagePath": spec["name"], "uploadUrl": f"{self.url}/upload/{spec['name']}"}
        return {"node": where | {"uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": "a"}}}


def _specs(given: dict[str, Any]) -> list[dict[str, Any]]:
    return given["input"]["artifactFiles"]


def _reply(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("content-type", "application/json")
    request.send_header("content-length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
