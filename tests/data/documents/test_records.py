"""What stands in the place of a record that is no document."""

from smoltrain.data.documents.records import BadRecord
from tests.data.documents.reading import jsonl, parquet, records


def test_what_is_empty_is_told_apart_from_what_is_bad():
    found = records("a.jsonl", jsonl({"text": ""}, {"text": None}, {"no": 1}, {"text": 3}))
    assert [record.empty for record in found if isinstance(record, BadRecord)] == [True, True, False, False]
    rows = records("a.parquet", parquet(text=["a", "", None]))
    assert [record.empty for record in rows if isinstance(record, BadRecord)] == [True, True]
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (only,) = records(name, b"")
        assert isinstance(only, BadRecord)
        assert only.empty
    (wrong,) = records("a.txt", b"\xff")
    assert isinstance(wrong, BadRecord)
    assert not wrong.empty
