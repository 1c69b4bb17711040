"""What does not fit is refused, before anything slow is done for it: ids, rows, streams."""

import shutil
from pathlib import Path

import pytest

from smoltrain.data.documents import retry
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from tests.data.tokens.test_prepare import config, mixed, write
from tests.data.tokens.test_tokenise import contents, make, problem


def test_ids_must_fit_the_model_before_anything_is_trained_or_written(root: Path, monkeypatch: pytest.MonkeyPatch):
    Tokenizer.train_bpe(["abc"], 257, "<|endoftext|>").save(root / "given")
    monkeypatch.setattr(retry, "read_records_with_retry", None)
    assert "saw 280, want at most model.vocab_size = 279" in problem(make(root, model__vocab_size=279))
    given = make(root, tokenizer__name=str(root / "given"), tokenizer__vocab_size=None, model__vocab_size=256)
    assert "saw 257, want at most model.vocab_size = 256" in problem(given)
    assert not (root / "runs").exists()


def test_too_few_rows_for_a_step(root: Path):
    assert "want at least one step's 4,000 rows" in problem(make(root, batch__micro_batch=2000))
    config = make(root)
    num_rows = (len(prepare_run_data(config).train[0]) - 1) // 16
    prepare_run_data(config, rows_per_step=num_rows)
    with pytest.raises(UserError, match=f"saw {num_rows:,} rows .* want at least one step's {num_rows + 1:,} rows"):
        prepare_run_data(config, rows_per_step=num_rows + 1)


def test_too_few_rows_for_validation_and_the_remedy_works(root: Path):
    text = (root / "source" / "00.txt").read_text() * 4
    shutil.rmtree(root / "source")
    (root / "source").mkdir()
    (root / "source" / "a.txt").write_text(text)
    line = problem(make(root, data__validation_share=0.01))
    assert "change data.validation_share = 0.01" in line
    assert not (root / "runs" / "run" / "data" / "index.json").exists()
    prepared = prepare_run_data(make(root, data__validation_share=0.3))
    assert {path.name for path in (root / "runs" / "run" / "data").iterdir()} == {"data", "index.json"}
    assert len(prepared.validation[0]) > 16


@pytest.mark.parametrize(
    ("streams", "rows", "world", "shown"),
    [(5, 12, 1, "saw 5 streams, want a divisor of 12"), (4, 12, 3, "saw 3 ranks, want one of 1, 2, 4 ranks")],
)
def test_streams_that_do_not_fit_are_refused_before_anything_is_made(
    shard_root: Path, streams: int, rows: int, world: int, shown: str
):
    with pytest.raises(UserError, match=shown):
        prepare_run_data(config(shard_root, data__streams=streams), rows_per_step=rows, world_size=world)
    assert contents(shard_root / "runs") == {}


def test_each_of_several_sources_has_a_row(shard_root: Path):
    write(shard_root / "news", 1, "n", num=2)
    (shard_root / "news" / "00.jsonl").write_text('{"text": "short"}\n{"text": "too"}\n')
    with pytest.raises(UserError) as caught:
        prepare_run_data(mixed(shard_root, "cached", "poems", "news"))
    assert [str(problem).partition(":")[0] for problem in caught.value.problems] == [
        "the training data of news are too few",
        "the validation data of news are too few",
    ]
