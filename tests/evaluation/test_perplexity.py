"""The perplexity of a text is that of a plain loop, also of transformers' own over the export."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.errors import UserError
from smoltrain.evaluation import read_text
from smoltrain.evaluation.perplexity import WindowSettings, add_up, choose_windows, format_text_loss, measure_file
from smoltrain.inference.load import LoadedModel, load_trained_model

TEXT = "The king of Naples met the queen, and 世界 \x7f too.\n" * 40


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def loop_of_transformers(model: Any, ids: list[int], max_length: int, stride: int) -> tuple[float, int]:
    """Sum of the losses and number of the tokens: the loop of transformers' page on perplexity, in which each token
    but the first is a target once."""
    total = 0.0
    count = 0
    previous_end = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        input_ids = torch.tensor([ids[begin:end]])
        labels = input_ids.clone()
        labels[:, : -(end - previous_end)] = -100
        num_targets = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(input_ids, labels=labels).loss
        total += float(loss) * num_targets if num_targets else 0.0
        count += num_targets
        previous_end = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (63, 63), (50, 49)])
def test_it_is_that_of_the_loop_over_the_export(
    loaded: LoadedModel, exported: Path, file: Path, context: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(exported)
    model: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]
    total, count = loop_of_transformers(model, ids, context + 1, stride)
    assert count == len(ids) - 1
    monkeypatch.setattr(read_text, "BLOCK_BYTES", 100)  # so that the text is put together of many blocks
    monkeypatch.setattr(read_text, "PIECE_CHARACTERS", 300)
    for source in (loaded, load_trained_model(str(exported))):
        found = measure_file(source, file, WindowSettings(context, stride, ""))
        assert found.tokens == count
        assert found.nats_per_token == pytest.approx(total / count, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(total / math.log(2) / len(TEXT.encode()), rel=1e-5)
        assert (found.documents, found.bytes, found.unspelled_bytes) == (1, len(TEXT.encode()), 0)


def test_files_add_up_and_are_told_in_a_line(loaded: LoadedModel, file: Path, tmp_path: Path) -> None:
    records = tmp_path / "two.jsonl"
    records.write_text('{"text": "the queen of Milan"}\n{"text": "the king of Tyre"}\n')
    windows = choose_windows(loaded, None, None)
    assert (windows.context, windows.stride) == (16, 8)
    assert windows.describe() == (
        "in windows of 16 tokens (as many as it was trained with), each 8 behind the one before"
    )
    one, two = (measure_file(loaded, path, windows) for path in (file, records))
    whole = add_up([one, two])
    assert (whole.documents, whole.tokens, two.bytes) == (3, one.tokens + two.tokens, 34)
    assert whole.nats_per_token == pytest.approx((one.loss + two.loss) / (one.tokens + two.tokens))
    line = format_text_loss(two)
    assert line.startswith(f"{records}: perplexity {two.perplexity:,.4f}, {two.nats_per_token:.5f} nats per token, ")
    assert line.endswith(f" (2 documents, 34 bytes, {two.tokens} tokens, each scored once)")


def test_documents_are_scored_apart(loaded: LoadedModel, tmp_path: Path) -> None:
    texts = [
        "the queen of Milan went to Tyre by night and by day",
        "the king of Tyre",
        "what news from Naples, my lord",
    ]
    windows = choose_windows(loaded, 16, 8)
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    apart = add_up([measure_file(loaded, tmp_path / f"{number}.txt", windows) for number in range(3)])
    (tmp_path / "all.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    together = measure_file(loaded, tmp_path / "all.jsonl", windows)
    assert together.loss == pytest.approx(apart.loss, rel=1e-6)
    assert together.tokens == apart.tokens


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [
        (65, None, "cannot read so many tokens: saw 65, want 1 to 64"),
        (0, None, "cannot read so many"),
        (16, 17, "the stride does not fit the context: saw 17, want 1 to 16"),
        (None, 0, "the stride does not fit"),
    ],
)
def test_windows_that_leave_tokens_out_are_refused(
    loaded: LoadedModel, context: int | None, stride: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_windows(loaded, context, stride)


def test_an_export_is_read_with_all_of_its_positions(exported: Path) -> None:
    windows = choose_windows(load_trained_model(str(exported)), None, None)
    assert (windows.context, windows.stride, windows.reason) == (64, 32, "as many as it has positions")


def test_a_file_without_text_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="there is no text"):
        measure_file(loaded, tmp_path / "empty.txt", choose_windows(loaded, None, None))
