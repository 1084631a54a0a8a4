#!/usr/bin/env bash
# Runs or continues a sweep, and stores rows, tables, figures, verdicts and traces under studies/.
# usage: scripts/study.sh SWEEP [SCALE] [key=value ...]
set -euo pipefail
: "${1:?usage: scripts/study.sh SWEEP [SCALE] [key=value ...]}"
cd "$(dirname "$0")/.."
python=${PYTHON:-python} runs=${RUNS_DIR:-runs} workers=${WORKERS:-2}
typed=("sweep=$1" "runs_dir=$runs") name=$1; shift
case ${1:-} in
  '' | *=*) ;;
  paper) typed+=("scale=$1"); shift ;;
  *) typed+=("scale=$1") name=${name}_$1; shift ;;
esac
typed+=("$@") folder=$runs/$name study=studies/$name
"$python" -m scaling_testbed.sweep run "${typed[@]}" --workers "$workers"
"$python" -m scaling_testbed.sweep collect "${typed[@]}"
mkdir -p "$study"
case $runs in /*) relative="s#$(dirname "$runs")/##g" ;; *) relative="" ;; esac  # leaves out the paths of this machine
sed "$relative" "$folder/results.jsonl" | gzip -9n > "$study/results.jsonl.gz"
sed "$relative" "$folder/plan.jsonl" > "$study/plan.jsonl"
cp "$folder/sweep.json" "$study/"
analysis=$(sed -n 's/.*"analysis": "\(.*\)".*/\1/p' "$study/sweep.json")
if [ "$analysis" = curvature ]; then
  "$python" -m scaling_testbed.analyze curvature "$folder" --all-steps --out "$folder/curvature.csv"
  sed "$relative" "$folder/curvature.csv" > "$study/curvature.csv"
fi
if [ "$analysis" = decide ]; then  # its question is no claim of a paper, so there are no verdicts
  files=() ; for ending in csv json png svg; do files+=(--out "$study/decide.$ending"); done
  "$python" -m scaling_testbed.analyze decide "$study" --setting logging.group "${files[@]}"
  exit
fi
report=("$folder" --out "$folder/report.html" --traces "$study/metrics")
[[ $analysis == report || $analysis == curvature ]] && report+=(--out "$study/figures.png" --out "$study/figures.svg")
"$python" -m scaling_testbed.analyze report "${report[@]}" | sed '/^wrote/d; /no trace/d; /^judged by:/d' | tee "$study/verdicts.txt"
files=() ; for ending in csv json png svg; do files+=(--out "$study/$analysis.$ending"); done
case $analysis in
  lr_sensitivity) "$python" -m scaling_testbed.analyze lr_sensitivity "$study" "${files[@]}" ;;
  critical_batch) "$python" -m scaling_testbed.analyze critical_batch "$study" --size n_params_non_embedding \
    --first-step 40 "${files[@]}" ;;
  instability) "$python" -m scaling_testbed.analyze instability "$study" --hold-out-largest "${files[@]}" ;;
esac
