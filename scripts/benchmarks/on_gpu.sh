#!/usr/bin/env bash
# Runs what needs a GPU, the most important first. Results are written to FOLDER as soon as they are measured.
# Usage: bash scripts/benchmarks/on_gpu.sh FOLDER [PART ...]; set PYTHON to choose an interpreter.
# PART is kernels, detection, tests, training_8b or training_1b; by default all. Each takes one to five minutes.
# NEURONS is the file of Llama 3.1 8B's published shared set; without it, 5% of the 8B model's neurons are trained.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit

folder="${1:?give a folder for the results}"
shift
python="${PYTHON:-python3}"
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

measure() {
  case "$1" in
    kernels) "$python" scripts/benchmarks/kernels.py --device cuda --output "$folder/kernels_gpu.json" ;;
    # In parallel, because most of the time goes into compiling kernels.
    tests) "$python" -m pytest -q -rs -n 12 --durations=15 tests/gpu 2>&1 | tee "$folder/tests.log" ;;
    detection)
      "$python" scripts/benchmarks/detection.py --device cuda --length 128 256 --batches 4 --rounds 5 --growth \
        --output "$folder/detection_gpu.json" --figure "$folder/detection_gpu.svg" ;;
    training_1b)
      "$python" scripts/benchmarks/training.py --shapes llama-3.2-1b --length 1024 --rounds 7 --one-at-a-time \
        --fraction 0.05 0.001 0.01 0.1 0.5 \
        --output "$folder/training_gpu_1b.json" --figure "$folder/training_gpu_1b.svg" ;;
    training_8b)
      "$python" scripts/benchmarks/training.py --shapes llama-3.1-8b --length 1024 --batch-size 1 --rounds 5 \
        --one-at-a-time --methods floor compact lora full ${NEURONS:+--neurons "$NEURONS"} \
        --output "$folder/training_gpu_8b.json" ;;
    *) echo "$1: unknown part; choose from kernels, detection, tests, training_8b, training_1b" >&2; return 2 ;;
  esac
}

[ $# -gt 0 ] || set -- kernels detection tests training_8b training_1b
status=0
for part in "$@"; do measure "$part" || status=$?; done
exit $status
