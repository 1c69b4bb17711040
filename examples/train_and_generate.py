"""Train the quickstart recipe for a few steps, look at the numbers, and let the model write.

    python examples/train_and_generate.py [FOLDER]      (FOLDER of the runs; by default runs/)

The same call goes on where the run stands: interrupt it with Ctrl-C, start it again.
"""

import sys

import smoltrain

config = smoltrain.load_config(
    "quickstart",
    {"phases.main.steps": 30, "phases.continuation.steps": 5, "evaluate.every": 10},
    run={"name": "example-first", "folder": sys.argv[1] if len(sys.argv) > 1 else "runs"},
    track={"wandb": "off"},
)
run = smoltrain.train(config)
if not run.is_finished:
    sys.exit(f"stopped by {run.stop_reason} at step {run.step}")

losses = run.metrics()["train/loss_nats_per_token"]
print(f"loss: {losses[0]:.3f} nats per token at the first step, {losses[-1]:.3f} at the last of {run.step}")

model = run.load()
for piece in model.stream("**ROMEO**  \n", max_tokens=40, temperature=0.8, seed=1):
    print(piece, end="", flush=True)
print()
for text in ("To be, or not to be", "be not To be, or to"):
    print(f"{model.loss(text):.3f} nats per token: {text}")
