# shellcheck shell=bash
# Creates .venv and installs the package into it, with the versions in constraints.txt. Sourced by the other scripts.
# Usage: source scripts/environment.sh EXTRA, which may be ""; PYTHON chooses the interpreter of a new .venv.

CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit

_extra="$1"
_gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then _gpu=yes; fi
_stamp=".venv/.installed${_extra:+-$_extra}"
_wanted="$(cat pyproject.toml constraints.txt | cksum) gpu=$_gpu"

if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
  _python="${PYTHON:-python3}"
  if ! "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "agnostic_train needs Python 3.11 or later: $_python is older or missing; set PYTHON to a newer one" >&2
    exit 2
  fi
  echo "installing into .venv (a few minutes the first time, GPU: $_gpu)"
  # An interrupted creation leaves one without pip.
  .venv/bin/python -m pip --version >/dev/null 2>&1 || "$_python" -m venv .venv
  # Quiet twice: shows errors, but not the warnings that some machines' package index causes.
  _pip=(.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt)
  _torch="$(grep '^torch==' constraints.txt)"
  _found="torch==$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)"
  if [ "$_gpu" = yes ] && [ "$_found" = "$_torch+cpu" ]; then
    # It satisfies the constraint, so pip would keep it.
    .venv/bin/python -m pip uninstall --quiet --yes torch
  elif [ "$_gpu" = no ] && [ "$(uname)" = Linux ] && [ "${_found%+cpu}" != "$_torch" ]; then
    # Plain torch brings gigabytes of CUDA. Try a CPU build from pip's configured index first, then PyTorch's own index.
    "${_pip[@]}" "$_torch+cpu" 2>/dev/null || "${_pip[@]}" "$_torch+cpu" --index-url https://download.pytorch.org/whl/cpu
  fi
  # `compat` adds this folder to sys.path: otherwise, a script in the parent folder would import the clone's folder, which
  # has the package's name.
  "${_pip[@]}" --config-settings editable_mode=compat -e ".${_extra:+[$_extra]}"
  echo "$_wanted" >"$_stamp"
fi
