"""The documents of any file, as pieces of text: a text of any length is read a block at a time."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.decompress import open_decompressed
from smoltrain.data.documents.readers import has_fields, read_records
from smoltrain.data.documents.records import BadRecord
from smoltrain.data.documents.shard import Shard, open_shard, report_unreadable
from smoltrain.data.tokenizers.tokenizer import split_text
from smoltrain.errors import Problem, UserError, exception_message

BLOCK_BYTES = 2**20
PIECE_CHARACTERS = 2**18  # tokenised at once, or a little more
MAX_RECORD_MIB = 1024.0  # of a file of records, of which one is held in memory


def read_file_documents(path: Path, text_field: str) -> Iterator[Iterator[str]]:
    """Each document of a file as the pieces of its text, which must be read before the next document is asked for.

    A file of records (.jsonl, .parquet and the like) has a document in each; any other file is one, of UTF-8, that may
    be compressed (.gz, .zst). Pieces are cut where a tokenizer cuts anyway. Empty records are no documents.
    Errors: UserError for a file that cannot be read, and for a record or a byte that is no text: nothing is left out.
    """
    if not path.is_file():
        what = "this is no file" if path.exists() else "there is no such file"
        raise UserError(Problem(what, str(path), "a file of text", "the FILE argument"))
    shard = Shard(path.name, str(path), path.stat().st_size, "")
    if not has_fields(path.name):
        yield _read_pieces(shard)
        return
    source = SourceSection(path=str(path), text_field=text_field)
    for record in read_records(shard, source, max_document_mib=MAX_RECORD_MIB):
        if not isinstance(record, BadRecord):
            yield split_text(record.text, PIECE_CHARACTERS)
        elif not record.empty:
            raise UserError(Problem("a record is no text", record.why, "a text in each record", record.place))


def _read_pieces(shard: Shard) -> Iterator[str]:
    text = ""
    for block in _read_blocks(shard):
        *pieces, text = split_text(text + block, PIECE_CHARACTERS)
        yield from pieces
    yield text


def _read_blocks(shard: Shard) -> Iterator[str]:
    """The text of a file, without a byte order mark. Errors: UserError for what is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with (
        report_unreadable(shard),
        open_shard(shard) as file,
        open_decompressed(shard, file, lambda: shard.place) as plain,
    ):
        num_read = 0
        while True:
            block = plain.read(BLOCK_BYTES)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                saw = f"{exception_message(error)}, within {BLOCK_BYTES:,} bytes behind byte {num_read:,}"
                raise UserError(Problem("the file is no text", saw, "text in UTF-8", shard.place)) from None
            if not block:
                break
            num_read += len(block)
            yield text
