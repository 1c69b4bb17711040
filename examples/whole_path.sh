#!/usr/bin/env bash
# From a text to a model on the Hub: train, look, judge, talk, take out.
#
#     examples/whole_path.sh [KEY=VALUE ...]     (overrides of quickstart; REPO=OWNER/NAME uploads the model)
#
# Two runs of quickstart under runs/, a minute and a half each on two cores. Started again, it goes on where they stand.
set -euo pipefail

# Two runs that differ in their seed: initial weights, and the order of the data.
smoltrain train quickstart run.name=first "$@"
smoltrain train quickstart run.name=second run.seed=2 "$@"

# Look at them; `smoltrain watch first` in another terminal shows a run while it trains.
smoltrain runs
smoltrain watch first --once
smoltrain summary first
smoltrain plot first
smoltrain report first
smoltrain compare first second

# Judge the model, by a text that it has never read and by a task.
echo "Shall I compare thee to a summer's day? Thou art more lovely and more temperate." >runs/sonnet.txt
smoltrain perplexity first runs/sonnet.txt
smoltrain eval first --tasks smoltrain_sentences --limit 20

# Let it write, and talk with it: without a pipe `smoltrain chat first` is a conversation.
smoltrain generate first --prompt "**ROMEO**"
printf '%s\n' 'To be, or not to be' '/temperature 0.5' 'What news?' | smoltrain chat first --seed 1

# Take it out: a Hugging Face folder, and its upload (HF_TOKEN).
smoltrain export first
if [ -n "${REPO:-}" ]; then smoltrain push first "$REPO"; fi
