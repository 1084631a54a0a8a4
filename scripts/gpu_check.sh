#!/usr/bin/env bash
# Tests and measures all that needs a GPU, within nine minutes; logs, results and a summary go to OUT_DIR.
# usage: scripts/gpu_check.sh OUT_DIR
# Needs PyTorch with CUDA, triton and pytest; uses pytest-xdist if it is installed. Missing packages can be wheels in
# $WHEELS (default: wheels/), which precede installed packages:
#   pip wheel --no-deps -w wheels hydra-core==1.3.8 omegaconf==2.3.1 antlr4-python3-runtime==4.9.3 \
#     liger-kernel==0.8.5 cut-cross-entropy==25.1.1
# Keep the results: cp OUT_DIR/*.json benchmarks/results/ && python -m benchmarks.harness
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

# step NAME SECONDS COMMAND...: run for at most SECONDS and the time left; then interrupt, so that it reports results.
step() {
  local name=$1 share=$2 began=$SECONDS left=$((end - SECONDS)) status word
  shift 2
  : >"$out/step.txt"
  if ((left < 15)); then
    word="not run" status=1
  else
    timeout -s INT -k 10 "$((share < left ? share : left))" "$@" >"$out/step.txt" 2>&1
    status=$?
    case $status in 0) word=ok ;; 124) word="cut short" ;; *) word="failed ($status)" ;; esac
  fi
  cat "$out/step.txt" >>"$out/log.txt"
  # The last step gets the time left. If that is too short, it has not failed.
  if [[ $name == kernels && $status == 124 ]] && ! grep -qE '^(FAILED|ERROR)' "$out/step.txt"; then status=0; fi
  ((status == 0)) || failed=1
  printf '%-10s %-12s %4d s\n' "$name" "$word" "$((SECONDS - began))" >>"$out/summary.txt"
  rm "$out/step.txt"
}

# bench NAME PEER...: run a benchmark, and again without these peers if one of them crashed the GPU.
bench() {
  local command=("$python" -m "benchmarks.$1" --out "$out" --seconds 90)
  step "$1" 110 "${command[@]}"
  if grep -qs "the GPU was lost" "$out/$1"-*.json; then step "$1" 110 "${command[@]}" --without "${@:2}"; fi
}

if compgen -G "${wheels:-/nowhere}/*.whl" >/dev/null; then
  side=$(mktemp -d) && trap 'rm -rf "$side"' EXIT
  # shellcheck disable=SC2016
  step wheels 30 bash -c 'for wheel in "$3"/*.whl; do
    "$1" -m pip install -q --no-deps --no-index --target "$2" "$wheel" || echo "left out: $wheel"
  done' install "$python" "$side" "$wheels"
  export PYTHONPATH="$side${PYTHONPATH:+:$PYTHONPATH}"
fi
# Most of the time of the tests is compilation, which can use all processors.
parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8")
step versions 15 "$python" -c 'import sys, torch, triton
print(sys.version, torch.__version__, triton.__version__, torch.cuda.get_device_properties(0), sep="\n")'
# shellcheck disable=SC2086
step tests 120 "$python" -m pytest $parallel -m gpu tests/kernels
bench head liger cut-cross
bench attention flex cudnn
left=$((end - SECONDS - 20))
step trainer 205 "$python" -m benchmarks.trainer --quick --out "$out" --seconds "$((left < 185 ? left : 185))"
# shellcheck disable=SC2086
step kernels 150 "$python" -m pytest -q $parallel tests/kernels/cross_entropy tests/kernels/attention tests/kernels/qk_norm_rope
cat "$out/summary.txt"
exit "$failed"
