#!/usr/bin/env bash
# Installs into .venv and runs the linter, the type checker and the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" dev
.venv/bin/ruff check agnostic_train tests scripts
.venv/bin/ruff format --check agnostic_train tests scripts
.venv/bin/mypy
# A file's tests share what is slow to make, so they stay in one process; the slow files, of integration, come first.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
