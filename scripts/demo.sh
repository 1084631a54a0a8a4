#!/usr/bin/env bash
# Trains a nano model on the source of Python's standard library and shows what the run leaves behind.
# usage: scripts/demo.sh [PYTHON] [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
"$python" -m scaling_testbed.train name=demo model=nano_m budget.steps=1000 "${@:2}"
