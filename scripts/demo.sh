#!/usr/bin/env bash
# Trains a small grid on the source of Python's standard library; prints its losses and its sensitivity to the rate.
# usage: scripts/demo.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
echo "Training 16 models of 25 or 99 thousand parameters on the source of Python's standard library."
echo "This takes about three minutes on two idle CPU cores. Runs that have finished are not trained again."
"$python" -m scaling_testbed.sweep run sweep=nano_lr name=demo --workers 2
"$python" -m scaling_testbed.analyze lr_sensitivity runs/demo --lr-range 1e-3,1
"$python" -m scaling_testbed.analyze report runs/demo --lr-range 1e-3,1 > /dev/null
echo "Open runs/demo/report.html in a browser: the figures, the tables and the claims of the paper, judged on these runs."
