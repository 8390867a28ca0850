#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth: the tests, then the benchmarks. Results go into FOLDER.
# Usage: bash scripts/benchmarks/on_gpu.sh FOLDER [SHARED_NEURONS.json]; set PYTHON to choose an interpreter.
# The second is Llama 3.1 8B's published shared set; without it, a twentieth of the 8B model's neurons train.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit

folder="${1:?a folder for the results}"
python="${PYTHON:-python3}"
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 status=0

"$python" -m pytest -q -rs tests/gpu 2>&1 | tee "$folder/tests.log" || status=1
"$python" scripts/benchmarks/detection.py --device cuda --length 128 256 --rounds 5 --growth \
  --output "$folder/detection_gpu.json" --figure "$folder/detection_gpu.svg" || status=1
"$python" scripts/benchmarks/training.py --shapes llama-3.2-1b --length 1024 --rounds 7 --one-at-a-time \
  --fraction 0.001 0.01 0.05 0.1 0.5 --output "$folder/training_gpu_1b.json" --figure "$folder/training_gpu_1b.svg" || status=1
"$python" scripts/benchmarks/training.py --shapes llama-3.1-8b --length 1024 --batch-size 1 --rounds 5 --one-at-a-time \
  --methods floor compact lora full ${2:+--neurons "$2"} --output "$folder/training_gpu_8b.json" || status=1
exit $status
