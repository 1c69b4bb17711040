"""The shards of a source, as most tests want them; and what a listing says when it goes wrong."""

from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.find_files import find_source_files
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import UserError


def list_shards(source: SourceSection, **keywords: Any) -> list[Shard]:
    """Only the files of `find_source_files`, without what lies beside them."""
    return find_source_files(source, **keywords).shards


def at(path: Path | str, **more: str) -> SourceSection:
    return SourceSection.model_validate({"path": str(path), **more})


def names(path: Path | str, **more: str) -> list[str]:
    return [shard.name for shard in list_shards(at(path, **more))]


def problem(source: SourceSection, **more: bool | str) -> str:
    """The one line that the user gets to see."""
    with pytest.raises(UserError) as caught:
        list_shards(source, **more)
    (only,) = caught.value.problems
    assert "\n" not in str(only)
    assert not {"", "None"} & {only.what, only.saw, only.want, only.change}
    return str(only)
