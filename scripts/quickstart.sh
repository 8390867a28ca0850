#!/usr/bin/env bash
# Installs into .venv and runs the whole chain on the embedded corpus and model. Running it again is quick and harmless.
set -euo pipefail
source "$(dirname "$0")/environment.sh" ""  # without an argument, it would see those of this script
exec .venv/bin/agnostic-train run recipes/quickstart.yaml "$@"
