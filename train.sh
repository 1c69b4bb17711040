#!/usr/bin/env bash
# Set everything up on a fresh machine, then train a recipe: ./train.sh [RECIPE] [section.key=value ...] [--ranks N]
# The same command resumes an interrupted run; when the plan is finished it says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch/setup.sh
setup
exec .venv/bin/smoltrain train "$@"
