#!/usr/bin/env bash
# Runs what needs a GPU, the most important first. Results are written to FOLDER as soon as they are measured.
# Usage: bash scripts/benchmarks/on_gpu.sh FOLDER [PART ...]; PYTHON chooses an interpreter other than .venv's.
# PART is kernels, detection, tests, training_8b or training_1b; by default all. Each takes one to five minutes.
# The tests need the packages of the extra `dev`.
# NEURONS is the file of Llama 3.1 8B's published shared set; without it, 5% of the 8B model's neurons are trained.
set -uo pipefail
parts="kernels detection tests training_8b training_1b"

fail() { echo "$1" >&2; exit 2; }
is_part() { case " $parts " in *" $1 "*) true ;; *) false ;; esac; }

if [ $# = 0 ] || is_part "$1"; then fail "usage: on_gpu.sh FOLDER [PART ...], where PART is one of $parts"; fi
folder="$(realpath -m -- "$1")"
shift
for part in "$@"; do is_part "$part" || fail "$part: unknown part; choose from $parts"; done
neurons="${NEURONS:+$(realpath -e -- "$NEURONS")}" || exit 2

CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit
python=.venv/bin/python
[ -x "$python" ] || python=python3
python="${PYTHON:-$python}"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  fail "$python: has no torch that sees a GPU; name another interpreter in PYTHON"
mkdir -p "$folder" || exit
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

measure() {
  case "$1" in
    kernels) "$python" scripts/benchmarks/kernel_options.py --device cuda --output "$folder/kernels_gpu.json" ;;
    # In parallel, because most of the time goes into compiling kernels; -v, so that a kill leaves the names of those done.
    tests) "$python" -m pytest -v -rs -n 12 --durations=15 tests/gpu 2>&1 | tee "$folder/tests.log" ;;
    detection)
      "$python" scripts/benchmarks/detection.py --device cuda --length 128 256 --batches 4 --rounds 5 --growth \
        --output "$folder/detection_gpu.json" --figure "$folder/detection_gpu.svg" ;;
    training_1b)
      "$python" scripts/benchmarks/training.py --device cuda --shapes llama-3.2-1b --length 1024 --rounds 7 --one-at-a-time \
        --fraction 0.05 0.001 0.01 0.1 0.5 \
        --output "$folder/training_gpu_1b.json" --figure "$folder/training_gpu_1b.svg" ;;
    training_8b)
      "$python" scripts/benchmarks/training.py --device cuda --shapes llama-3.1-8b --length 1024 --batch-size 1 \
        --rounds 5 --one-at-a-time --methods floor compact lora full ${neurons:+--neurons "$neurons"} \
        --output "$folder/training_gpu_8b.json" ;;
  esac
}

# shellcheck disable=SC2086  # several words
[ $# -gt 0 ] || set -- $parts
status=0
for part in "$@"; do measure "$part" || status=$?; done
exit $status
