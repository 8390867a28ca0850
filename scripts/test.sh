#!/usr/bin/env bash
# Installs into .venv and runs the linter, the type checker and the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh" dev
.venv/bin/ruff check agnostic_train tests scripts
.venv/bin/ruff format --check agnostic_train tests scripts
.venv/bin/mypy
# The tests of a file share slow fixtures, so they stay in one process; the integration tests, which are slow, come first.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
