#!/usr/bin/env bash
# Installs into .venv and runs the linter, the type checker and the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" dev
.venv/bin/ruff check agnostic_train tests scripts
.venv/bin/ruff format --check agnostic_train tests scripts
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
