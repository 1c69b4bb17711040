#!/usr/bin/env bash
# The table of one GPU, for smollm2-135m at T 2048 in bf16, some 40 minutes:
#
#     launch/gpu_bench.sh [FOLDER] [section.key=value ...]
#
# First ours beside other trainers, then ours alone for every attention kernel, with and without torch.compile, for
# each way of gradient checkpointing and ZeRO-1 and 2 (ZeRO-0 in bf16 is refused: docs/decisions.md). Each cell is a
# JSON in FOLDER; FOLDER/table.md has them all. A cell that fails, for want of memory or of a kernel, says so and is
# not in the table. No GPU has run it yet; tests/benchmarks/test_gpu_bench.py runs it on a CPU, at a tiny shape.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BIN="${BIN:-.venv/bin}"
AGAINST="${AGAINST-hf-trainer,plain+compile}" # installed into environments of their own; empty for none
read -ra KERNELS <<<"${KERNELS:-flash sdpa}"
read -ra RECOMPUTE <<<"${RECOMPUTE:-none selective full}"
read -ra STAGES <<<"${STAGES:-zero1 zero2}"
out="${1:-runs/gpu_bench}"
shift || true
task=(smollm2-135m batch.sequence_length=2048 batch.micro_batch=16 batch.rows_per_step=64 batch.accumulation=null "$@")
mkdir -p "$out"
out="$(cd "$out" && pwd)"

cell() { # NAME WORDS...: a run of its own, whose failure does not end the others
  local name="$1"
  shift
  echo "== $name"
  "$BIN/python" -m benchmarks.train "${task[@]}" "$@" --steps "${STEPS:-20}" --out "$out/$name.json" ||
    echo "$name failed" >&2
}

rm -f "$out"/*.json
cell beside-others ${AGAINST:+--against "$AGAINST"}
for kernel in "${KERNELS[@]}"; do
  for compile in on off; do
    for recompute in "${RECOMPUTE[@]}"; do
      for zero in "${STAGES[@]}"; do
        cell "$kernel-compile-$compile-$recompute-$zero" --rounds 1 "engine.attention=$kernel" \
          "engine.compile=$compile" "engine.gradient_checkpointing=$recompute" "engine.ds_config=$zero"
      done
    done
  done
done
"$BIN/python" - "$out" <<'PYTHON' | tee "$out/table.md"
import json, sys
from pathlib import Path

files = sorted(Path(sys.argv[1]).glob("*.json"), key=lambda file: (file.stem != "beside-others", file.stem))
print("| cell | trainer | tokens/s | MFU | GiB | start-up, s |\n|---|---|---|---|---|---|")
for file in files:
    found = json.loads(file.read_text())
    for name, row in found["measured"].items():
        numbers = f"{row['tokens_per_s']:,.0f} | {row['mfu']:.1%} | {row['peak_gib']:.1f} | {row['start_s']:.1f}"
        print(f"| {file.stem} | {name} | {numbers} |")
    for name, why in found["not_measured"].items():
        print(f"| {file.stem} | {name} | {why} | | | |")
PYTHON
