"""Train on texts that this program makes, and log a metric of its own beside smoltrain's.

python examples/own_dataset_and_metric.py [FOLDER]
"""

import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import smoltrain


def make_sums(count: int) -> Iterator[str]:
    """Documents: a page of additions each. Any iterable of texts will do; it must give the same ones at each start."""
    dice = random.Random(0)
    for _ in range(count):
        pairs = [(dice.randrange(10), dice.randrange(10)) for _ in range(40)]
        yield "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


def measure(step: int, metrics: dict[str, Any]) -> dict[str, float]:
    """Called after each step; what it returns stands in metrics.jsonl, and in W&B, as custom/perplexity."""
    return {"perplexity": math.exp(metrics["train/loss_nats_per_token"])}


config = smoltrain.load_config(
    "quickstart",
    {"model.vocab_size": 300, "tokenizer.vocab_size": 300, "phases.main.steps": 30, "phases.continuation.steps": 5},
    run={"name": "example-sums", "folder": sys.argv[1] if len(sys.argv) > 1 else "runs"},
    sample={"prompts": ["3 + 4 ="]},
    track={"wandb": "off"},
)
run = smoltrain.train(config, documents=make_sums(400), callbacks=[measure])
perplexities = run.metrics()["custom/perplexity"]
print(f"perplexity: {perplexities[0]:.1f} at the first step, {perplexities[-1]:.1f} at the last")
print("the model adds: 2 + 2 =", run.load().generate("2 + 2 =", max_tokens=4, greedy=True).strip())
