#!/usr/bin/env bash
# Trains a small grid on the source of Python's standard library and prints its final losses.
# usage: scripts/demo.sh [PYTHON] [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
"$python" -m scaling_testbed.sweep run sweep=nano_lr name=demo workers=2 "${@:2}"
