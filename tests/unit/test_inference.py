"""A model that is measured is left as it was found, and so is torch."""

import subprocess
import sys

import pytest
import torch

from agnostic_train.model.inference import left_as_found

SETTINGS = {
    "default": "",
    "older interface": "torch.backends.cuda.matmul.allow_tf32 = True",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "newer interface": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "every backend": "torch.backends.fp32_precision = 'tf32'",
}
PROGRAM = """
import torch
from agnostic_train.model.inference import full_precision

def read(function):
    try:
        return function()
    except RuntimeError:
        return "refused"

def state():
    matmul = torch.backends.cuda.matmul
    return [
        read(it)
        for it in (
            lambda: matmul.fp32_precision, lambda: matmul.allow_tf32, torch.get_float32_matmul_precision,
            lambda: torch.backends.fp32_precision,
        )
    ]

{setting}
before = state()
with full_precision():
    assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
assert state() == before, (before, state())
"""


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_tf32_is_off_in_between_however_it_was_turned_on(setting):
    """In a process of its own: torch's two interfaces don't mix, and what was set through one stays."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(setting=setting)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_measures_a_model_turns_tf32_off(llama):
    torch.set_float32_matmul_precision("high")
    try:
        with left_as_found(llama):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
