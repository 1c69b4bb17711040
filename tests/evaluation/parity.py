"""docs/results/eval-parity.md: what the harness gets from our model and from its own class over the export, compared.

`.venv/bin/python -m tests.evaluation.parity` writes the page anew, with a tiny run that it makes; the extra `eval`
must be installed. tests/evaluation/test_harness.py holds the page to the same numbers of requests and the same limit.
"""

import logging
import tempfile
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "results" / "eval-parity.md"
LIMIT = 1e-5  # of a log-likelihood
TEXTS = ("the king of", "what news from", "my lord of", "and by night the queen of", "Grüße von")
ENDS = (" Naples", " Milan went to Tyre", " 世界", " Verona, my lord?")
LONG = "the king of Naples spoke to the queen of Milan by night " * 6  # more than the tiny model's positions


class Comparison(NamedTuple):
    """One kind of request."""

    kind: str
    num_requests: int
    largest: float  # difference of two log-likelihoods, over the larger of them
    num_equal: int  # answers that are alike: greedy or not, or the text itself


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=words, idx=0) for words in arguments]


def load_their_model(exported: Path) -> Any:
    """HFLM, without the max_new_tokens of the export's generation_config.json, which it would put above a task's."""
    from lm_eval.models import huggingface

    make: Any = huggingface.HFLM
    model = make(pretrained=str(exported), dtype="float32", device="cpu", batch_size=8)
    model.model.generation_config.max_new_tokens = None
    return model


def compare(ours: Any, theirs: Any) -> list[Comparison]:
    """Each kind of request, asked of both."""
    pairs = [(text, end) for text in (*TEXTS, "", LONG) for end in ENDS]
    asked = requests("loglikelihood", *pairs)
    found = ours.loglikelihood(asked)
    wanted = theirs.loglikelihood(asked, disable_tqdm=True)
    num_equal = sum(one[1] == other[1] for one, other in zip(found, wanted, strict=True))
    rows = [Comparison("loglikelihood", len(asked), _largest([x for x, _ in found], [x for x, _ in wanted]), num_equal)]
    asked = requests("loglikelihood_rolling", *((text,) for text in (*TEXTS, LONG)))
    found = ours.loglikelihood_rolling(asked)
    wanted = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    rows.append(Comparison("loglikelihood_rolling", len(asked), _largest(found, wanted), len(asked)))
    options = {"max_gen_toks": 16, "do_sample": False, "until": ["q"]}
    asked = requests("generate_until", *((text, options) for text in TEXTS))
    found = ours.generate_until(asked)
    wanted = theirs.generate_until(asked, disable_tqdm=True)
    rows.append(Comparison("generate_until", len(asked), 0.0, sum(map(str.__eq__, found, wanted))))
    return rows


def _largest(found: list[float], wanted: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))


def describe(rows: list[Comparison], sentences: tuple[float, float]) -> str:
    """The page."""
    what = (
        "lm-evaluation-harness asked twice: our `HarnessModel` on a checkpoint, and its own class `HFLM` on the export "
        "of the same checkpoint (a tiny run of 28,832 parameters and 64 positions, fp32, one CPU). Differences are "
        f"those of fp32 in another order of additions; the tests allow {LIMIT:g}. Written by"
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("lm_eval", "transformers", "torch"))
    lines = [
        f"| `{row.kind}` | {row.num_requests} | {f'{row.largest:.0e}' if row.largest else 'texts'} | "
        f"{row.num_equal} of {row.num_requests} |"
        for row in rows
    ]
    accuracies = (
        f"`smoltrain_sentences`, accuracy: {sentences[0]:.4f} by ours, {sentences[1]:.4f} by theirs. "
        f"Versions: {versions}."
    )
    return f"""# The harness on our model and on its export

{textwrap.fill(what, 100, break_on_hyphens=False)}

```sh
.venv/bin/python -m tests.evaluation.parity
```

| request | how many | largest difference, of the log-likelihood | alike: greedy or not, texts |
|---|---|---|---|
{chr(10).join(lines)}

{textwrap.fill(accuracies, 100, break_on_hyphens=False)}
"""


def measure_sentences(ours: Any, theirs: Any) -> tuple[float, float]:
    """Accuracy of the local task by both."""
    from lm_eval import evaluator

    from smoltrain.evaluation.harness import LOCAL_TASK, load_tasks, quiet_harness

    tasks = load_tasks([LOCAL_TASK], say=print)
    accuracies = []
    for model in (ours, theirs):
        with quiet_harness():
            found: Any = evaluator.evaluate(model, tasks.loaded, bootstrap_iters=0, log_samples=False)
        accuracies.append(found["results"][LOCAL_TASK]["acc,none"])
    return accuracies[0], accuracies[1]


def write_page() -> None:
    """Make a run and its export, compare, and write the page."""
    from smoltrain.evaluation.harness_model import HarnessModel
    from smoltrain.evaluation.judge import LoadedJudge
    from smoltrain.export.export import export_model
    from smoltrain.inference.load import load_trained_model
    from tests import folders

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        run = folders.run(Path(folder))
        exported = export_model(str(run))
        ours = HarnessModel(LoadedJudge(load_trained_model(str(run))))
        theirs = load_their_model(exported)
        PAGE.write_text(describe(compare(ours, theirs), measure_sentences(ours, theirs)), encoding="utf-8")


if __name__ == "__main__":
    write_page()
