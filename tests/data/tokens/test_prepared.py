"""What is said of prepared data."""

from pathlib import Path

from smoltrain.data.tokens.prepare import prepare_run_data
from tests.data.tokens.test_tokenise import make, problem


def test_one_line_about_the_tokenizer(root: Path):
    prepared = prepare_run_data(make(root))
    about = f"bpe: {prepared.tokenizer.num_ids} ids, separator <|endoftext|> = 0"
    assert prepared.describe_tokenizer() == f"{about}; nothing of a sample of the text is lost"


def test_a_pad_token_is_recorded_and_may_not_change(root: Path):
    config = make(root, tokenizer__pad="<|pad|>", model__vocab_size=281)
    prepared = prepare_run_data(config)
    num_ids = prepared.tokenizer.num_ids
    assert prepared.tokenizer.pad_id == num_ids - 1
    said = f"separator <|endoftext|> = 0, pad <|pad|> = {num_ids - 1}; nothing of a sample of the text is lost"
    assert prepared.describe_tokenizer() == f"bpe: {num_ids} ids, {said}"
    assert '"pad_token": "<|pad|>"' in (config.run_folder / "tokenizer" / "tokenizer_config.json").read_text()
    assert (prepared.index.fingerprint.pad, prepared.index.separator_id) == ("<|pad|>", 0)
    assert prepare_run_data(config).tokenizer.pad_id == prepared.tokenizer.pad_id
    assert "saw pad = none, want pad = <|pad|>" in problem(make(root))
    no_room = make(root, run__name="other", tokenizer__pad="<|pad|>", model__vocab_size=280)
    assert "saw 281, want at most model.vocab_size = 280" in problem(no_room)
