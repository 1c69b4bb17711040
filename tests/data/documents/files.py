"""The shards of a source, as most tests want them."""

from typing import Any

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.find_files import find_source_files
from smoltrain.data.documents.shard import Shard


def list_shards(source: SourceSection, **keywords: Any) -> list[Shard]:
    """Only the files of `find_source_files`, without what lies beside them."""
    return find_source_files(source, **keywords).shards
