#!/usr/bin/env bash
# Trains a nano model on the Python standard library's source and shows what the run leaves behind.
set -euo pipefail
python=${1:-python}
"$python" -m scaling_testbed.train name=demo model=nano_l budget.steps=600 "${@:2}"
