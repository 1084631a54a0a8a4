#!/usr/bin/env bash
# Runs a sweep to its end, or goes on with it, and files rows, tables, figures and report under studies/.
# usage: scripts/study.sh SWEEP SCALE [key=value ...]
set -euo pipefail
: "${2:?usage: scripts/study.sh SWEEP SCALE [key=value ...]}"
cd "$(dirname "$0")/.."
python=${PYTHON:-python} runs=${RUNS_DIR:-runs} workers=${WORKERS:-2}
folder=$runs/$1; study=studies/$1
[ "$2" = paper ] || { folder=${folder}_$2; study=${study}_$2; }
typed=("sweep=$1" "scale=$2" "runs_dir=$runs" "${@:3}")
"$python" -m scaling_testbed.sweep run "${typed[@]}" workers="$workers"
"$python" -m scaling_testbed.sweep collect "${typed[@]}"
mkdir -p "$study"
gzip -9nc "$folder/results.jsonl" > "$study/results.jsonl.gz"
cp "$folder/plan.jsonl" "$folder/sweep.json" "$study/"
"$python" -m scaling_testbed.analyze report "$folder" --out "$folder/report.html"
case $(sed -n 's/.*"analysis": "\(.*\)".*/\1/p' "$study/sweep.json") in
  lr_sensitivity) "$python" -m scaling_testbed.analyze lr_sensitivity "$study" --out "$study" ;;
  instability) "$python" -m scaling_testbed.analyze instability "$study" --hold-out-largest --out "$study" ;;
esac
