"""W&B's offline files, read back: LevelDB's log framing around wandb's protobuf records."""

import contextlib
import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 1 << 15  # bytes: ":W&B", magic and version; then blocks of chunks
FULL, _FIRST, _MIDDLE, LAST = 1, 2, 3, 4  # the kinds of chunk that a record is made of


@dataclass
class Offline:
    """What one process logged."""

    run_id: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)  # step -> everything logged at it
    artifacts: list[dict[str, Any]] = field(default_factory=list)  # name, type, aliases, files: path -> size
    defined: dict[str, tuple[str, set[str]]] = field(default_factory=dict)  # metric -> its axis, its summaries
    saved: dict[str, str] = field(default_factory=dict)  # path of a file -> when it is uploaded
    log: list[str] = field(default_factory=list)  # lines of the Logs tab
    exit_code: int | None = None


def read(path: Path) -> Offline:
    """One run-ID.wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    offline = Offline()
    for content in records(path.read_bytes()):
        record = Record.FromString(content)
        match record.WhichOneof("record_type"):
            case "run":
                offline.run_id = record.run.run_id
                offline.job_type = record.run.job_type
                offline.config |= {c.key: json.loads(c.value_json) for c in record.run.config.update if c.key}
            case "history":
                values: dict[str, Any] = {}
                for item in record.history.item:
                    *parents, last = list(item.nested_key) or [item.key]
                    node = values
                    for parent in parents:
                        node = node.setdefault(parent, {})
                    node[last] = json.loads(item.value_json)
                offline.steps.setdefault(values["_step"], {}).update(values)
            case "artifact":
                a = record.artifact
                sizes = {content.path: content.size for content in a.manifest.contents}
                offline.artifacts.append({"name": a.name, "type": a.type, "aliases": list(a.aliases), "files": sizes})
            case "metric":
                summaries = {entry.name for entry, asked in record.metric.summary.ListFields() if asked}
                offline.defined[record.metric.name] = record.metric.step_metric, summaries
            case "files":
                offline.saved |= {item.path: item.PolicyType.Name(item.policy) for item in record.files.files}
            case "output_logger":
                offline.log.append(record.output_logger.line)
            case "exit":
                offline.exit_code = record.exit.exit_code
    return offline


def read_finished(path: Path, patience_s: float = 20) -> Offline:
    """The file of a run that was finished: W&B's own process may write the last records after finish() has returned."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError):  # half a chunk
            if (offline := read(path)).exit_code is not None:
                return offline
        time.sleep(0.05)
    return read(path)


def records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log; every checksum is verified."""
    assert content[:4] == b":W&B", "not a W&B file"
    at, parts = HEADER, b""
    while at + HEADER <= len(content):
        if (left := BLOCK - at % BLOCK) < HEADER:  # a chunk's head never crosses a border: the rest is padding
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, at)
        chunk = content[at + 6 : at + HEADER + length]  # the checksum covers the kind too
        assert zlib.crc32(chunk) == checksum, f"broken chunk at byte {at}"
        parts += chunk[1:]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
