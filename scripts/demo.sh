#!/usr/bin/env bash
# Trains a small grid on the source code of sympy; prints its losses, its sensitivity to the rate and its critical rates.
# usage: scripts/demo.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
readme=77e84a2a66e77922 # the fingerprint of the corpus of README's table
echo "Training 36 models of 6 to 99 thousand parameters on the source code of sympy 1.14.0, which PyTorch requires."
echo "This takes about four minutes on two idle CPU cores. Runs that have finished are not trained again."
corpus=$("$python" -m scaling_testbed.prepare data=sympy)
echo "$corpus"
here=$(sed -n 's/^fingerprint  *//p' <<< "$corpus")
if [ "$here" = "$readme" ]; then
  echo "README's table was made on the corpus $readme. This machine has the same corpus."
else
  echo "README's table was made on the corpus $readme. This machine has another one: do not compare the losses."
fi
"$python" -m scaling_testbed.sweep run sweep=demo --workers 2
"$python" -m scaling_testbed.analyze lr_sensitivity runs/demo
"$python" -m scaling_testbed.analyze report runs/demo > /dev/null
echo "Open runs/demo/report.html in a browser: the figures, the tables, and the effects that the paper's claims are about."
