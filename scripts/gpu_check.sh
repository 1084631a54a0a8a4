#!/usr/bin/env bash
# Tests and measures what needs a GPU, in stages. Results, logs and a summary go to OUT_DIR.
# usage: scripts/gpu_check.sh OUT_DIR [STAGE...]
#   versions  the machine and its limits                                             20 s
#   run       whole runs: the same bits again and after a kill, in four modes        55 s
#   nccl      ddp and fsdp with one process, and ddp with two on one GPU             25 s
#   steps     where the time of a step goes, at five sizes; aims of MFU             100 s
#   head      the loss head by width and size of a chunk                             50 s
#   sdpa      the backends of attention, and whether they repeat to the bit          30 s
#   tests     the tests of the kernels that need a GPU                              120 s
#   heads     the loss head beside its peers                                        110 s
#   attention attention and qk-norm beside their peers                              110 s
#   trainer   the trainer with every loss and attention path                        205 s
#   kernels   the other tests of the kernels, as far as time allows                 150 s
# Without a STAGE: the first six, which take 280 s. A stage that fails or takes too long does not stop the next.
# Needs PyTorch with CUDA, triton and pytest; uses pytest-xdist if it is installed. Missing packages can be wheels in
# $WHEELS (default: wheels/), which precede installed packages:
#   pip wheel --no-deps -w wheels hydra-core==1.3.8 omegaconf==2.3.1 antlr4-python3-runtime==4.9.3 \
#     liger-kernel==0.8.5 cut-cross-entropy==25.1.1
# Keep the results: cp OUT_DIR/*.json benchmarks/results/ && python -m benchmarks.harness
set -uo pipefail
mkdir -p "${1:?usage: scripts/gpu_check.sh OUT_DIR [STAGE...]}" && out=$(cd "$1" && pwd) || exit 1
shift
known=(versions run nccl steps head sdpa tests heads attention trainer kernels)
stages=("${@:-${known[@]:0:6}}")
for stage in "${stages[@]}"; do
  if [[ " ${known[*]} " != *" $stage "* ]]; then
    echo "gpu_check: there is no stage $stage; there are ${known[*]}" >&2
    exit 2
  fi
done
wheels=$(cd "${WHEELS:-$(dirname "$0")/../wheels}" 2>/dev/null && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: $python has no PyTorch that sees a CUDA GPU; nothing was checked" >&2
  exit 2
fi
failed=0
# A later call adds to the summary and the log of an earlier one.
echo "$(date -u '+%F %T') UTC: ${stages[*]}" | tee -a "$out/log.txt" >>"$out/summary.txt"

# step NAME SECONDS COMMAND...: run for at most SECONDS, then interrupt, so that it reports results.
step() {
  local name=$1 share=$2 began=$SECONDS status word
  shift 2
  timeout -s INT -k 10 "$share" "$@" >"$out/step.txt" 2>&1
  status=$?
  case $status in 0) word=ok ;; 124) word="cut short" ;; *) word="failed ($status)" ;; esac
  cat "$out/step.txt" >>"$out/log.txt"
  # The time of the last stage is what is left. If that is too short, it has not failed.
  if [[ $name == kernels && $status == 124 ]] && ! grep -qE '^(FAILED|ERROR)' "$out/step.txt"; then status=0; fi
  ((status == 0)) || failed=1
  printf '%-10s %-12s %4d s\n' "$name" "$word" "$((SECONDS - began))" >>"$out/summary.txt"
  grep -hE ': (NOT )?met$' "$out/step.txt" | sed 's/^ */  /' | sort -u >>"$out/summary.txt"
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
for stage in "${stages[@]}"; do
  case $stage in
    versions) step versions 20 "$python" -m benchmarks.machine --out "$out" ;;
    run) step run 55 "$python" -m benchmarks.runs --out "$out" --seconds 48 ;;
    nccl) step nccl 25 "$python" -m benchmarks.runs --processes --out "$out" --seconds 18 ;;
    steps) step steps 100 "$python" -m benchmarks.steps --out "$out" --seconds 92 ;;
    head)
      step head 50 "$python" -m benchmarks.head --widths 96,256,768,2048 --chunk-mib 16,64,256 --rounds 5 \
        --without "without Triton" F.cross torch cut-cross --out "$out" --seconds 42
      ;;
    sdpa) step sdpa 30 "$python" -m benchmarks.attention --sdpa --rounds 8 --out "$out" --seconds 22 ;;
    # shellcheck disable=SC2086
    tests) step tests 120 "$python" -m pytest $parallel -m gpu tests/kernels ;;
    heads) bench head liger cut-cross ;;
    attention) bench attention flex cudnn ;;
    trainer) step trainer 205 "$python" -m benchmarks.trainer --quick --out "$out" --seconds 185 ;;
    kernels)
      # shellcheck disable=SC2086
      step kernels 150 "$python" -m pytest -q $parallel tests/kernels/cross_entropy tests/kernels/attention \
        tests/kernels/qk_norm_rope
      ;;
  esac
done
cat "$out/summary.txt"
exit "$failed"
