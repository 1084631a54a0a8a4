#!/usr/bin/env bash
# Trains a small grid on the source of Python's standard library; prints its losses and its sensitivity to the rate.
# usage: scripts/demo.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
"$python" -m scaling_testbed.sweep run sweep=nano_lr name=demo --workers 2
"$python" -m scaling_testbed.analyze lr_sensitivity runs/demo --lr-range 1e-3,1
