#!/usr/bin/env bash
# What a command shows on a real terminal of so many columns and lines, with what has scrolled off it, without colours:
#   benchmarks/record_terminal.sh COLUMNS LINES COMMAND...
# SNAPSHOTS=FILE also keeps what the last line of the screen showed, twice a second: the bar. Needs tmux.
set -euo pipefail
columns=$1 lines=$2
shift 2
server=record-$$
trap 'tmux -L "$server" kill-server 2>/dev/null || true' EXIT # ours alone: the socket has our process's number
tmux -L "$server" -f /dev/null start-server \; set -g history-limit 20000 \; set -g remain-on-exit on \; set -g status off \; \
  new-session -d -x "$columns" -y "$lines" "$(printf '%q ' "$@")"
while [[ $(tmux -L "$server" display -p '#{pane_dead}') != 1 ]]; do
  [[ -z ${SNAPSHOTS:-} ]] || tmux -L "$server" capture-pane -p | grep -v '^$' | tail -n 1 >>"$SNAPSHOTS" || true
  sleep 0.5
done
tmux -L "$server" capture-pane -p -S - | sed -e 's/ *$//' -e '/^Pane is dead/d'
