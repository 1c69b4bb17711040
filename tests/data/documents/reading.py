"""A shard out of bytes, and what is read of it."""

import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import strategies as st

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.readers import read_records
from smoltrain.data.documents.records import BadRecord, Document, Record
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import UserError

ZSTD_FRAMES = (
    "28b52ffd04586100007b2274657874223a20226f6e391f0b4c"
    "28b52ffd0458a1000065227d0a7b2274657874223a202274776f227d0a7cb23db5"
)


MIB = 2**20
PIECES = st.sampled_from(
    ["one", "zwö", "", " ", "\n", "\r\n", "\n\n", "\n \n", "<|", "|>", "<|endoftext|>", "\u2028", "𝄞"]
)


TEXT = st.lists(PIECES, max_size=8).map("".join)


LINES_OF_TWO = b'{"text": "one"}\n{"text": "two"}\n'


def shard_of(name: str, raw: bytes) -> Shard:
    return Shard(name, f"/data/{name}", len(raw), "size only")


def records(name: str, raw: bytes, *, first: int = 0, stride: int = 1, mib: float = 50, **more: Any) -> list[Record]:
    """What is read of a file with that name and those bytes."""
    source = SourceSection.model_validate({"path": "/data", **more})
    slice_ = {"first": first, "stride": stride, "max_document_mib": mib}
    return list(
        read_records(shard_of(name, raw), source, **slice_, opener=lambda shard: io.BufferedReader(io.BytesIO(raw)))
    )


def texts(name: str, raw: bytes, **more: Any) -> list[str]:
    found = records(name, raw, **more)
    assert not [record for record in found if isinstance(record, BadRecord)]
    return [record.text for record in found if isinstance(record, Document)]


def problem(name: str, raw: bytes, kind: type[UserError] = UserError, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        records(name, raw, **more)
    assert type(caught.value) is kind
    (only,) = caught.value.problems
    assert "\n" not in str(only)
    assert not {"", "None"} & {only.what, only.saw, only.want, only.change}
    return str(only)


def compressed(raw: bytes, suffix: str) -> bytes:
    match suffix.lower():
        case ".gz":
            return gzip.compress(raw)
        case ".zst":
            return zstandard.ZstdCompressor().compress(raw)
    return raw


def jsonl(*fields: object) -> bytes:
    return "".join(json.dumps(f) + "\n" for f in fields).encode()


def parquet(row_group_size: int | None = None, **columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return file.getvalue()
