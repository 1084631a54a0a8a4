#!/usr/bin/env bash
# Tests and measures all that needs a GPU, within nine minutes; logs, results and a summary go to OUT_DIR.
# usage: scripts/gpu_check.sh OUT_DIR
# Needs PyTorch with CUDA, triton and pytest. Pure wheels in $WHEELS (default: wheels/) serve for what else is missing.
set -uo pipefail
mkdir -p "${1:?usage: scripts/gpu_check.sh OUT_DIR}" && out=$(cd "$1" && pwd) || exit 1
wheels=$(cd "${WHEELS:-$(dirname "$0")/../wheels}" 2>/dev/null && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: $python has no PyTorch that sees a CUDA GPU; nothing was checked" >&2
  exit 2
fi
end=$((SECONDS + 530))
failed=0
: >"$out/summary.txt" && : >"$out/log.txt"

step() { # step NAME SECONDS COMMAND...: no longer than its share, nor than what is left of the whole
  local name=$1 share=$2 began=$SECONDS left=$((end - SECONDS)) status=124 word
  shift 2
  ((left < 5)) || { timeout -k 5 "$((share < left ? share : left))" "$@" >>"$out/log.txt" 2>&1; status=$?; }
  case $status in 0) word=ok ;; 124 | 137) word="timed out" ;; *) word="failed ($status)" ;; esac
  ((status == 0)) || failed=1
  printf '%-10s %-12s %4d s\n' "$name" "$word" "$((SECONDS - began))" >>"$out/summary.txt"
}

if compgen -G "${wheels:-/nowhere}/*.whl" >/dev/null && ! "$python" -c 'import hydra, liger_kernel' 2>/dev/null; then
  side=$(mktemp -d) && trap 'rm -rf "$side"' EXIT
  step wheels 20 "$python" -m pip install --no-deps --no-index --target "$side" "$wheels"/*.whl
  export PYTHONPATH="$side${PYTHONPATH:+:$PYTHONPATH}"
fi
step versions 15 "$python" -c 'import sys, torch, triton
print(sys.version, torch.__version__, triton.__version__, torch.cuda.get_device_properties(0), sep="\n")'
step tests 110 "$python" -m pytest -m gpu tests/kernels
step head 110 "$python" -m benchmarks.head --out "$out" --seconds 95
step attention 90 "$python" -m benchmarks.attention --out "$out" --seconds 78
step trainer 200 "$python" -m benchmarks.trainer --quick --out "$out" --seconds 185
step kernels 90 "$python" -m pytest -q tests/kernels/test_cross_entropy.py tests/kernels/test_attention.py \
  tests/kernels/test_qk_norm_rope.py
cat "$out/summary.txt"
exit "$failed"
