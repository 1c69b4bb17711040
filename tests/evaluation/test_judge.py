"""What a task asks of a loaded model: scores in any order of lengths, texts up to where they are to end."""

from smoltrain.config.schema import GenerationSection
from smoltrain.evaluation.judge import LoadedJudge, WriteRequest
from smoltrain.evaluation.score import Window, score_batch
from smoltrain.inference.load import LoadedModel


def test_scores_come_in_the_order_of_their_windows(loaded: LoadedModel) -> None:
    windows = [Window(list(range(5, 5 + length)), 2) for length in (4, 30, 3, 12)]
    alone = [score_batch(loaded.model, [window])[0] for window in windows]
    together = LoadedJudge(loaded).score(windows)
    assert [round(score.log_probability, 4) for score in together] == [round(s.log_probability, 4) for s in alone]
    assert LoadedJudge(loaded).score([]) == []


def test_what_is_written_ends_before_the_first_of_the_stop_texts(loaded: LoadedModel) -> None:
    judge = LoadedJudge(loaded)
    settings = GenerationSection(max_tokens=30, temperature=0.0)
    ids = judge.tokenizer.encode("the king of")
    [whole] = judge.write([WriteRequest(ids, settings, ())])
    assert len(whole) > 8
    stop = whole[4:6]
    [cut] = judge.write([WriteRequest(ids, settings, ("not in it at all", stop))])
    assert cut == whole[: whole.index(stop)]
